"""Inputs to hold a graph against its model with: the user's, the checkpoint's, or made up."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.contract.text_source import TextSource
from rekd_train.errors import CheckpointError, InputError
from rekd_train.inputs.image import ImageSettings
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor

LIMIT = 200
_EXAMPLES_FILE = "examples.jsonl"
"""Held-out examples that a checkpoint carries: {"text": ..., "label": ...} on each line."""
_IMAGES_FILE = "examples.npz"
"""Held-out images that a checkpoint carries: ``pixels``, uint8 (n, height, width, channels), and ``labels``."""
_GENERATED = 64


@dataclass(frozen=True)
class Examples:
    """Texts or images and where they come from."""

    items: list[Any]
    """What the model's preprocessing takes."""
    source: str
    """'file', 'checkpoint' or 'generated'."""
    labels: list[int] | None = None
    """Index of each one's class; None where the checkpoint does not tell."""


def parity_examples(
    checkpoint: Path,
    preprocessor: Preprocessor,
    file: str | Path | None = None,
    limit: int = LIMIT,
    class_names: Sequence[str] = (),
) -> Examples:
    """The texts of ``file``, else the checkpoint's own examples, else texts or images made up.

    Args:
        class_names: the model's; with them the examples' labels are read, where every one has one of these.

    Raises:
        InputError: the file is missing, not UTF-8, holds a line that is no text (names the line), or the model
            reads images.
        CheckpointError: the checkpoint's examples are damaged.
    """
    if preprocessor.settings.kind == "image":
        if file is not None:
            raise InputError(f"{file} holds texts, but the checkpoint reads images; fix: leave out --parity-texts")
        own = Path(checkpoint) / _IMAGES_FILE
        if own.is_file():
            pixels, labels = _stored_images(own, preprocessor.settings)
            known = len(labels) == len(pixels) and all(0 <= label < len(class_names) for label in labels)
            return Examples(list(pixels[:limit]), "checkpoint", labels[:limit] if known else None)
        return Examples(list(generated_images(preprocessor.settings)), "generated")
    if file is not None:
        return _of_file(file, limit, class_names, "file")
    own = Path(checkpoint) / _EXAMPLES_FILE
    if own.is_file() and own.stat().st_size:
        return _of_file(own, limit, class_names, "checkpoint")
    return Examples(texts_from_vocabulary(preprocessor), "generated")


def served_lengths(preprocessor: Preprocessor, policy: SelectionPolicy, lengths: tuple[int, ...]) -> Preprocessor:
    """``with_lengths``; where padding may be selected, the model's limit alone: there padding counts, so every text
    must have as much of it as in training."""
    alone = policy.selectable == "all" and isinstance(preprocessor, TextPreprocessor)
    return with_lengths(preprocessor, (preprocessor.positions,) if alone else lengths)


def with_lengths(preprocessor: Preprocessor, lengths: tuple[int, ...]) -> Preprocessor:
    """The same preprocessing of texts, padding to these lengths; the model's limit is always one of them."""
    if not lengths or not isinstance(preprocessor, TextPreprocessor):
        return preprocessor
    return TextPreprocessor(preprocessor.tokenizer_json, replace(preprocessor.settings, lengths=lengths))


def texts_from_vocabulary(preprocessor: TextPreprocessor, count: int = _GENERATED, seed: int = 0) -> list[str]:
    """Random words of the vocabulary, one to one and a half times ``max_length`` of them; the same at every call."""
    words = preprocessor.words() or ["a"]
    generator = np.random.default_rng(seed)
    lengths = np.geomspace(1, 1.5 * preprocessor.settings.max_length, count).round().astype(int)
    return [" ".join(generator.choice(words, size=length)) for length in lengths]


def generated_images(settings: ImageSettings, count: int = _GENERATED, seed: int = 0) -> np.ndarray:
    """uint8 (count, height, width, channels): noise over slopes of light, the same at every call."""
    generator = np.random.default_rng(seed)
    down = np.linspace(-1, 1, settings.height)[:, None, None]
    across = np.linspace(-1, 1, settings.width)[None, :, None]
    slopes = generator.normal(scale=60, size=(2, count, 1, 1, settings.channels))
    noise = generator.normal(scale=30, size=(count, settings.height, settings.width, settings.channels))
    return np.clip(127 + slopes[0] * down + slopes[1] * across + noise, 0, 255).astype(np.uint8)


def _stored_images(path: Path, settings: ImageSettings) -> tuple[np.ndarray, list[int]]:
    """Pixels and labels; no labels where the file holds none."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            pixels = stored["pixels"]
            labels = stored["labels"].tolist() if "labels" in stored else []
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged: {error}; fix: copy it again") from None
    wanted = (settings.height, settings.width, settings.channels)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != wanted or not len(pixels):
        raise CheckpointError(f"{path} holds {pixels.dtype} {pixels.shape}, not uint8 images of {wanted}")
    return pixels, labels


def _of_file(file: str | Path, limit: int, class_names: Sequence[str], source: str) -> Examples:
    """The first texts, and their classes where each has a known one under "label"."""
    sourced = list(islice(TextSource(str(file)), limit))
    places = {name: index for index, name in enumerate(class_names)}
    named = [each.record.get("label") for each in sourced]
    labels = [places.get(label) if isinstance(label, str) else None for label in named]
    return Examples([each.text for each in sourced], source, labels if None not in labels else None)
