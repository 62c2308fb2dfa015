"""What a prediction is: label, probabilities and the words or patches that decided, torch-free.

The same classes come from the PyTorch model, the in-process pipeline and the Triton client.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

RATIONALE = ".rationale.png"  # ends the names of pictures that show a rationale; no training data set reads them


@dataclass(frozen=True)
class Piece:
    """One kept token, exactly as the predictor saw it."""

    start: int  # first character in the text as given
    end: int  # one past the last character
    token: str  # the vocabulary entry (a WordPiece may start with '##')
    position: int  # index in the token sequence of the text, not of a window; 0 is [CLS]
    score: float  # selector score z1 - z0, noise-free; higher is more wanted


@dataclass(frozen=True)
class Span:
    """Neighbouring whole words of the rationale, merged."""

    start: int  # first character in the text as given
    end: int  # one past the last character
    text: str  # ``text[start:end]`` of the text as given
    score: float  # highest selector score among the span's kept pieces


@dataclass(frozen=True)
class Patch:
    """One kept patch of an image."""

    row: int  # row of the patch grid, 0 at the top
    column: int  # column of the patch grid, 0 at the left
    box: tuple[int, int, int, int]  # left, top, right, bottom: pixels of the image as given, the last two exclusive
    score: float  # selector score z1 - z0, noise-free; higher is more wanted


@dataclass(frozen=True)
class Prediction:
    """An answer and the part of the input it was made from."""

    label: str  # name of the most probable class
    probabilities: dict[str, float]  # calibrated probability of each class, by label name, in the model's class order
    rationale: list[Span] | list[Patch]  # whole-word spans, or the patches of an image, in reading order
    rate: float  # kept / real pieces after truncation (by windows: of all), no specials; of an image kept / all patches
    truncated: bool  # True when the text was longer than the model reads and its end was cut
    text: str = ""  # the text as given; empty for an image
    pieces: list[Piece] = field(default_factory=list)  # the kept tokens one by one; empty for an image
    doubt: float | None = None  # share of the dev texts whose words are more usual, 0..1; None: an image, or not known

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
        rationale = [  # JSON has lists only
            Patch(**{**part, "box": tuple(part["box"])}) if "row" in part else Span(**part)
            for part in document["rationale"]
        ]
        pieces = [Piece(**piece) for piece in document["pieces"]]
        return cls(**{**own, "rationale": rationale, "pieces": pieces})


def most_probable(labels: Sequence[str], probabilities: np.ndarray) -> tuple[str, dict[str, float]]:
    """The label of the highest of (C,) probabilities, and each by its label."""
    return labels[int(probabilities.argmax())], dict(zip(labels, map(float, probabilities), strict=True))


class Tokenized(Protocol):
    """What is read of a ``tokenizers.Encoding``: token by token, the special ones included."""

    tokens: Sequence[str]  # vocabulary entries
    offsets: Sequence[tuple[int, int]]  # first character and one past the last, in the text as given
    word_ids: Sequence[int | None]  # number of the word; None for a special token


def kept_pieces(encoding: Tokenized, kept: np.ndarray, scores: np.ndarray) -> list[Piece]:
    """The kept tokens one by one; ``kept`` are positions, ``scores`` (N,)."""
    tokens, offsets = encoding.tokens, encoding.offsets
    return [Piece(start, end, token=tokens[position], position=int(position), score=float(scores[position]))
            for position in kept for start, end in [offsets[position]]]


_LINE_BREAK_TAG = re.compile(r"<br\s*/?>", re.IGNORECASE)


def clean_text(text: str) -> str:
    """Replace ``<br />`` by spaces of the same length, so that character offsets stay valid."""
    return _LINE_BREAK_TAG.sub(lambda match: " " * len(match.group()), text)


UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x9FFF),
            (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
"""Code points of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def _unspaced(letter: str) -> bool:
    return letter > "\u0dff" and any(first <= ord(letter) <= last for first, last in UNSPACED)


def _joins(letter: str) -> bool:
    """Whether a character belongs to the one before it: an accent of its own, a vowel sign, half of an emoji."""
    return unicodedata.category(letter)[0] == "M" or letter in "\u200d\ufe0f" or "\U0001f3fb" <= letter <= "\U0001f3ff"


def _begins_word(text: str, end: int, start: int) -> bool:
    """Whether, behind a token that ends at ``end``, one of the same tokenizer's word is the reader's next word."""
    if any(letter.isspace() for letter in text[end:start]):
        return True
    return not _joins(text[start]) and (_unspaced(text[start]) or _unspaced(text[end - 1]))


def merged_spans(text: str, encoding: Tokenized, kept: np.ndarray, scores: np.ndarray) -> list[Span]:
    """Whole words with any kept piece; words with nothing between them merge into one span.

    Words are the tokenizer's own, cut further where it takes white space or a script without spaces for one word.
    Tokens that share a character are of one word; white space alone is none.
    """
    words, offsets = encoding.word_ids, encoding.offsets  # once: each reading copies a whole list out of the library
    score_of = {int(position): float(scores[position]) for position in kept}
    chosen = {words[position] for position in score_of} - {None}
    read, previous = clean_text(text), None
    found: list[list] = []  # start, end and best score of the words that hold a chosen one
    for position, word in enumerate(words):
        if word not in chosen:
            continue
        start, end = offsets[position]
        start, end = end - len(read[start:end].lstrip()), start + len(read[start:end].rstrip())
        if start >= end:
            continue
        score = score_of.get(position, -math.inf)
        apart = not found or start >= found[-1][1]
        if apart and (word != previous or _begins_word(read, found[-1][1], start)):
            found.append([start, end, score])
        else:
            found[-1][1:] = [max(found[-1][1], end), max(found[-1][2], score)]
        previous = word
    spans: list[Span] = []
    for start, end, score in found:
        if score == -math.inf:
            continue
        while end < len(read) and _joins(read[end]):  # an accent that the tokenizer left out
            end += 1
        between = read[spans[-1].end : start] if spans else ""
        if spans and all(letter.isspace() or unicodedata.category(letter)[0] in "CM" for letter in between):
            start, score = spans[-1].start, max(spans[-1].score, score)
            spans.pop()
        spans.append(Span(start, end, text[start:end], score))
    return spans
