"""Inputs to compare a graph with its model on: the user's, the checkpoint's, or made up; and those constructed to be
awkward: shortest, longest, padded, at the budget's steps, tied. torch-free."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.contract.text_source import TextSource
from rekd_deploy.runtimes.base import Arrays
from rekd_train.errors import CheckpointError, InputError
from rekd_train.inputs.image import ImageSettings
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor

LIMIT = 200
_TEXTS_FILE, _IMAGES_FILE = "examples.jsonl", "examples.npz"
"""What a checkpoint carries: lines {"text": ..., "label": ...}; ``pixels``, uint8 (n, height, width, channels), and
``labels``."""
_GENERATED = 64


@dataclass(frozen=True)
class Examples:
    """Texts or images, as the model's preprocessing takes them, and where they come from."""

    items: list[Any]
    source: str
    """'file', 'checkpoint' or 'generated'."""
    labels: list[int] | None = None
    """Index of each one's class; None where the checkpoint does not tell."""


def parity_examples(
    checkpoint: Path, preprocessor: Preprocessor, file: str | Path | None = None, class_names: Sequence[str] = ()
) -> Examples:
    """The first texts of ``file``, else the checkpoint's own examples, else texts or images made up.

    Args:
        class_names: the model's; with them the examples' labels are read, where every one has one of these.

    Raises:
        InputError: the file is missing, holds a line that is no text (names the line), or the model reads images.
        CheckpointError: the checkpoint's examples are damaged.
    """
    if preprocessor.settings.kind == "image":
        if file is not None:
            raise InputError(f"{file} holds texts, but the checkpoint reads images; fix: leave out --parity-texts")
        path = Path(checkpoint) / _IMAGES_FILE
        if not path.is_file():
            return Examples(made_up(preprocessor), "generated")
        return _images(path, preprocessor.settings, len(class_names))
    own = Path(checkpoint) / _TEXTS_FILE
    if file is None and not (own.is_file() and own.stat().st_size):
        return Examples(made_up(preprocessor), "generated")
    sourced = list(islice(TextSource(str(file or own)), LIMIT))
    indices = {name: index for index, name in enumerate(class_names)}
    named = [each.record.get("label") for each in sourced]
    labels = [indices.get(label) if isinstance(label, str) else None for label in named]
    source = "checkpoint" if file is None else "file"
    return Examples([each.text for each in sourced], source, labels if None not in labels else None)


def _images(path: Path, settings: ImageSettings, classes: int) -> Examples:
    """The checkpoint's images, and their labels where the file holds one of the model's for each."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            pixels = stored["pixels"]
            labels = stored["labels"].tolist() if "labels" in stored else []
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged: {error}; fix: copy it again") from None
    wanted = (settings.height, settings.width, settings.channels)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != wanted or not len(pixels):
        raise CheckpointError(f"{path} holds {pixels.dtype} {pixels.shape}, not uint8 images of {wanted}")
    known = len(labels) == len(pixels) and all(0 <= label < classes for label in labels)
    return Examples(list(pixels[:LIMIT]), "checkpoint", labels[:LIMIT] if known else None)


def served_lengths(preprocessor: Preprocessor, policy: SelectionPolicy, lengths: tuple[int, ...]) -> Preprocessor:
    """``with_lengths``; the model's limit alone where padding may be selected: it must be as much as in training."""
    return with_lengths(preprocessor, (preprocessor.positions,) if policy.selectable == "all" else lengths)


def with_lengths(preprocessor: Preprocessor, lengths: tuple[int, ...]) -> Preprocessor:
    """The same preprocessing of texts, padding to these lengths; the model's limit is always one of them."""
    if not lengths or not isinstance(preprocessor, TextPreprocessor):
        return preprocessor
    settings = replace(preprocessor.settings, lengths=lengths)
    return TextPreprocessor(preprocessor.tokenizer_json, settings, preprocessor.familiarity)


def made_up(preprocessor: Preprocessor) -> list[Any]:
    """Texts or images that the preprocessing takes; the same at every call."""
    if isinstance(preprocessor, TextPreprocessor):
        return texts_from_vocabulary(preprocessor)
    return list(generated_images(preprocessor.settings))


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


def constructed_inputs(preprocessor: Preprocessor, policy: SelectionPolicy, capacity: int) -> Iterator[Arrays]:
    """Batches of inputs as the graphs take them.

    Of texts: random words, one alone and at every padding, none at all, full length, mixed lengths in one batch, fewer
    positions than slots, and word counts at which the budget takes its first and its last step. Of images: black,
    white, a point, a board, noise.
    """
    if preprocessor.settings.kind == "image":
        yield from _constructed_images(preprocessor.settings)
        return
    longest = preprocessor.settings.max_length
    for width in sorted({3, min(4, longest), *preprocessor.settings.buckets}):
        yield _batch(preprocessor, [1], width)
    yield _batch(preprocessor, [0, 1], min(8, longest))
    yield _batch(preprocessor, [longest - 2] * 3, longest)
    mixed = {1, 2, 3, longest // 4, longest // 2, longest - 2}
    yield _batch(preprocessor, sorted(count for count in mixed if 1 <= count <= longest - 2), longest)
    if capacity > 3:
        yield _batch(preprocessor, [1, capacity - 3], capacity - 1)
    for width in (width for width in preprocessor.settings.buckets if width < longest):  # each has slots of its own
        steps = _budget_steps(policy, width - 2, policy.capacity(width - 2))
        yield _batch(preprocessor, sorted({*(count for count in steps if count >= 1), width - 2}), width)
    steps = [count for count in _budget_steps(policy, longest - 2, capacity) if count >= 1]
    for count in steps:
        yield _batch(preprocessor, [count], count + 2)
    if steps:
        yield _batch(preprocessor, steps, longest)


def _constructed_images(settings: ImageSettings) -> Iterator[Arrays]:
    generator = np.random.default_rng(0)
    size = (settings.height, settings.width, settings.channels)
    noise = generator.integers(0, 256, (5, *size), dtype=np.uint8)
    point = np.zeros(size, np.uint8)
    point[-1, -1] = 255
    board = np.broadcast_to((np.indices(size[:2]).sum(axis=0) % 2 * 255)[:, :, None], size).astype(np.uint8)
    odd = np.stack([np.zeros(size, np.uint8), np.full(size, 255, np.uint8), point, board, noise[0]])
    for batch in (*odd[:, None], odd, noise):
        yield {"pixels": np.ascontiguousarray(batch)}


def constructed_scores(preprocessor: Preprocessor, policy: SelectionPolicy, capacity: int) -> Iterator[Arrays]:
    """Batches with scores: {"scores" (B, N) float32} and the inputs.

    All equal, equal in groups around the cut, equal to the threshold, rising, falling, zeros of both
    signs, very large; texts each at full length, padded, and with fewer positions than slots.
    """
    generator = np.random.default_rng(0)
    if preprocessor.settings.kind == "image":
        inputs = next(batch for batch in _constructed_images(preprocessor.settings) if len(batch["pixels"]) > 1)
        batches = [((len(inputs["pixels"]), preprocessor.positions), inputs)]
    else:
        longest = preprocessor.settings.max_length
        steps = _budget_steps(policy, longest - 2, capacity)
        counts = sorted({count for count in (0, 1, 2, *steps, longest // 2, longest - 2) if count >= 0})
        widths = sorted({longest, max(3, min(capacity - 1, longest))})
        texts = [_batch(preprocessor, [count for count in counts if count + 2 <= width], width) for width in widths]
        batches = [(inputs["input_ids"].shape, inputs) for inputs in texts]
    for shape, inputs in batches:
        for scores in _awkward(shape, np.float32(0.0 if policy.bias is None else -policy.bias), generator):
            yield {"scores": np.ascontiguousarray(scores, dtype=np.float32), **inputs}


def _awkward(shape: tuple[int, ...], threshold: np.float32, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Scores (B, N) that are hard to decide on."""
    place = np.broadcast_to(np.arange(shape[1], dtype=np.float32), shape)
    for level in (np.float32(0), threshold, np.nextafter(threshold, np.float32(np.inf)), -7.5, 7.5):
        yield np.full(shape, level)
    yield place - 2
    yield 2 - place
    yield generator.integers(0, 2, shape) * 4 - 2
    yield generator.integers(-2, 3, shape) + threshold
    yield np.where(generator.random(shape) < 0.5, -0.0, 0.0)
    yield generator.normal(size=shape) * 1e30


def _budget_steps(policy: SelectionPolicy, most: int, capacity: int) -> list[int]:
    """Counts of selectable features just below and at which the budget grows to 2 and to ``capacity``."""
    limits = policy.limits(np.arange(most + 1))
    firsts = [int(np.argmax(limits >= size)) for size in {2, capacity} if (limits >= size).any()]
    return sorted({count for first in firsts for count in (first - 1, first)})


def _batch(preprocessor: TextPreprocessor, word_counts: list[int], width: int) -> Arrays:
    """Rows [CLS] words [SEP] padding with so many random words each."""
    start, *ends = preprocessor.around
    ordinary = np.setdiff1d(np.arange(preprocessor.vocabulary_size), list(preprocessor.special_ids.values()))
    generator = np.random.default_rng([width, *word_counts])
    rows = [[start, *generator.choice(ordinary, size=count).tolist(), *ends] for count in word_counts]
    return preprocessor.pad(rows, width)
