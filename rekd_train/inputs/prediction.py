"""What a prediction is: label, probabilities and the words or patches that decided, torch-free.

The same classes come from the PyTorch model, the in-process pipeline and the Triton client.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

RATIONALE = ".rationale.png"
"""How the names of pictures end that show an image's rationale; no training data set reads them."""


@dataclass(frozen=True)
class Piece:
    """One kept token, exactly as the predictor saw it."""

    start: int
    """First character in the text as given."""
    end: int
    """One past the last character."""
    token: str
    """The vocabulary entry (a WordPiece may start with '##')."""
    position: int
    """Index in the token sequence of the text, not of a window; 0 is [CLS]."""
    score: float
    """Selector score z1 - z0, noise-free; higher is more wanted."""


@dataclass(frozen=True)
class Span:
    """Neighbouring whole words of the rationale, merged."""

    start: int
    """First character in the text as given."""
    end: int
    """One past the last character."""
    text: str
    """``text[start:end]`` of the text as given."""
    score: float
    """Highest selector score among the span's kept pieces."""


@dataclass(frozen=True)
class Patch:
    """One kept patch of an image."""

    row: int
    """Row of the patch grid, 0 at the top."""
    column: int
    """Column of the patch grid, 0 at the left."""
    box: tuple[int, int, int, int]
    """(left, top, right, bottom) in pixels of the image as given; right and bottom are one past the last."""
    score: float
    """Selector score z1 - z0, noise-free; higher is more wanted."""


@dataclass(frozen=True)
class Prediction:
    """An answer and the part of the input it was made from."""

    label: str
    """Name of the most probable class."""
    probabilities: dict[str, float]
    """Calibrated probability of each class, by label name, in the model's class order."""
    rationale: list[Span] | list[Patch]
    """Whole-word spans, or the patches of an image, in reading order."""
    rate: float
    """Kept pieces / real pieces after truncation (by windows: of the whole text), specials excluded; of an image,
    kept patches / patches."""
    truncated: bool
    """True when the text was longer than the model reads and its end was cut."""
    text: str = ""
    """The text as given; empty for an image."""
    pieces: list[Piece] = field(default_factory=list)
    """The kept tokens one by one; empty for an image."""

    @property
    def probability(self) -> float:
        """Probability of ``label``."""
        return self.probabilities[self.label]

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict) -> Prediction:
        """The inverse of ``to_dict``; other keys are left out."""
        own = {each.name: document[each.name] for each in fields(cls) if each.name in document}
        rationale = [_part(part) for part in document["rationale"]]
        pieces = [Piece(**piece) for piece in document["pieces"]]
        return cls(**{**own, "rationale": rationale, "pieces": pieces})


def _part(document: dict) -> Span | Patch:
    if "row" not in document:
        return Span(**document)
    return Patch(**{**document, "box": tuple(document["box"])})  # JSON has lists only


def most_probable(labels: Sequence[str], probabilities: np.ndarray) -> tuple[str, dict[str, float]]:
    """The label of the highest of (C,) probabilities, and each by its label."""
    return labels[int(probabilities.argmax())], dict(zip(labels, map(float, probabilities), strict=True))


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
        Piece(start, end, token=tokens[position], position=int(position), score=float(scores[position]))
        for position in kept for start, end in [offsets[position]]
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
            best[word] = max(best.get(word, -math.inf), float(scores[position]))
    bounds: dict[int, tuple[int, int]] = {}
    for position, word in enumerate(words):
        if word is not None and word in best:
            start, end = offsets[position]
            first, last = bounds.get(word, (start, end))
            bounds[word] = (min(first, start), _past_combining(text, max(last, end)))
    spans = []
    for _, neighbours in groupby(enumerate(sorted(best)), key=lambda pair: pair[1] - pair[0]):
        group = [word for _, word in neighbours]
        start, end = bounds[group[0]][0], bounds[group[-1]][1]
        spans.append(Span(start, end, text[start:end], max(best[word] for word in group)))
    return spans
