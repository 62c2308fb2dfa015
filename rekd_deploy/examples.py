"""Texts to hold a graph against its model with: the user's, the checkpoint's, or made from its vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rekd_train.errors import InputError
from rekd_train.preprocess import TextPreprocessor, check_texts

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
        InputError: the file is missing, holds no usable text, or is not of a kind that is read.
    """
    if file is not None:
        return Examples(read_texts(Path(file))[:limit], "file")
    own = Path(checkpoint) / _EXAMPLES_FILE
    if own.is_file() and own.stat().st_size:
        return Examples(read_texts(own)[:limit], "checkpoint")
    return Examples(texts_from_vocabulary(preprocessor), "vocabulary")


def read_texts(path: Path) -> list[str]:
    """Texts of a .jsonl file (key "text") or a .txt file (one a line; empty lines are skipped).

    Raises:
        InputError: names the file and the line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); fix: convert it to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        texts = [_text_of_json(line, path, number) for number, line in lines]
    else:
        texts = [line.strip() for _, line in lines]
    if not texts:
        raise InputError(f"{path} holds no text")
    return check_texts(texts)


def _text_of_json(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f'{path}, line {number}: not a JSON object with the key "text"') from None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{path}, line {number}: "text" is not a string with at least one word')
    return text


def texts_from_vocabulary(preprocessor: TextPreprocessor, count: int = _GENERATED, seed: int = 0) -> list[str]:
    """Random words of the vocabulary, one to one and a half times ``max_length`` of them; the same at every call."""
    words = preprocessor.words() or ["a"]
    generator = np.random.default_rng(seed)
    lengths = np.geomspace(1, 1.5 * preprocessor.settings.max_length, count).round().astype(int)
    return [" ".join(generator.choice(words, size=length)) for length in lengths]
