"""Kept positions of a token sequence -> pieces and whole words of the text. Torch-free."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rekd_train.inputs.prediction import Piece, Span


class Tokenized(Protocol):
    """What is read of a ``tokenizers.Encoding``: token by token, the special ones included."""

    tokens: Sequence[str]
    """Vocabulary entries."""
    offsets: Sequence[tuple[int, int]]
    """First character and one past the last, in the text as given."""
    word_ids: Sequence[int | None]
    """Number of the word; None for a special token."""


def kept_pieces(encoding: Tokenized, kept: np.ndarray, scores: np.ndarray) -> list[Piece]:
    """The kept tokens one by one; ``kept`` are positions, ``scores`` (N,)."""
    tokens, offsets = encoding.tokens, encoding.offsets
    return [
        Piece(*offsets[position], token=tokens[position], position=int(position), score=float(scores[position]))
        for position in kept
    ]


def _past_combining(text: str, end: int) -> int:
    """An accent written as a character of its own is no token, but belongs to the word before it."""
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return end


def merged_spans(text: str, encoding: Tokenized, kept: np.ndarray, scores: np.ndarray) -> list[Span]:
    """Whole words with any kept piece; neighbouring words merge into one span."""
    words, offsets = encoding.word_ids, encoding.offsets  # once: each reading copies a whole list out of the library
    best: dict[int, float] = {}
    for position in kept:
        word = words[position]
        if word is not None:
            best[word] = max(best.get(word, -np.inf), float(scores[position]))
    bounds: dict[int, tuple[int, int]] = {}
    for position, word in enumerate(words):
        if word in best:
            start, end = offsets[position]
            first, last = bounds.get(word, (start, end))
            bounds[word] = (min(first, start), _past_combining(text, max(last, end)))
    spans: list[Span] = []
    previous = None
    for word in sorted(best):
        start, end = bounds[word]
        score = best[word]
        if previous is not None and word == previous + 1:
            start, score = spans[-1].start, max(score, spans[-1].score)
            spans.pop()
        spans.append(Span(start, end, text[start:end], score))
        previous = word
    return spans
