"""Texts to hold a graph against its model with: the user's, the checkpoint's, or made from its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from rekd_deploy.text_source import texts_from_file
from rekd_train.preprocess import TextPreprocessor

LIMIT = 200
_EXAMPLES_FILE = "examples.jsonl"
"""Held-out examples that a checkpoint carries: {"text": ..., "label": ...} on each line."""
_GENERATED = 64


@dataclass(frozen=True)
class Examples:
    """Texts and where they come from."""

    texts: list[str]
    source: str
    """'file', 'checkpoint' or 'vocabulary'."""


def parity_examples(
    checkpoint: Path, preprocessor: TextPreprocessor, file: str | Path | None = None, limit: int = LIMIT
) -> Examples:
    """The texts of ``file``, else of the checkpoint's examples.jsonl, else texts made from the vocabulary.

    Raises:
        InputError: the file is missing, not UTF-8, or holds a line that is no text; names the line.
    """
    if file is not None:
        return Examples(_first_texts(file, limit), "file")
    own = Path(checkpoint) / _EXAMPLES_FILE
    if own.is_file() and own.stat().st_size:
        return Examples(_first_texts(own, limit), "checkpoint")
    return Examples(texts_from_vocabulary(preprocessor), "vocabulary")


def texts_from_vocabulary(preprocessor: TextPreprocessor, count: int = _GENERATED, seed: int = 0) -> list[str]:
    """Random words of the vocabulary, one to one and a half times ``max_length`` of them; the same at every call."""
    words = preprocessor.words() or ["a"]
    generator = np.random.default_rng(seed)
    lengths = np.geomspace(1, 1.5 * preprocessor.settings.max_length, count).round().astype(int)
    return [" ".join(generator.choice(words, size=length)) for length in lengths]


def _first_texts(file: str | Path, limit: int) -> list[str]:
    return [sourced.text for sourced in islice(texts_from_file(str(file)), limit)]
