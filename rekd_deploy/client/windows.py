"""Texts longer than the model reads: predicted window by window, and the predictions combined. torch-free.

A long text is read in windows of the model's full length, each sharing a quarter with the one before it
(``TextPreprocessor.window_overlap``); the last holds what is left. The predictions become one by two rules:

- **Probabilities**: every token of the text has one vote and shares it out among the windows that read it; a class's
  probability is the mean of the windows' probabilities, weighted by their votes. The label is the most probable class.
- **Rationale**: every token that any window kept, for all of these decided and no other. Words
  are whole, neighbouring words are one span, offsets are those of the whole text; a score is the highest that any
  window which kept the token gave it. The rate is kept tokens / tokens of the whole text, and may lie a little above
  the model's budget, because two windows may choose differently where they overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Encoding

from rekd_train.inputs.prediction import Prediction, kept_pieces, merged_spans


@dataclass(frozen=True)
class WindowedText:
    """A text and its windows."""

    text: str
    """The text as given."""
    windows: list[Encoding] = field(repr=False)
    """Every window with its special tokens, offsets into the whole text; a short text has one."""
    overlap: int
    """Tokens that a window shares with the one before it."""

    @classmethod
    def of(cls, text: str, encoding: Encoding, overlap: int) -> WindowedText:
        """The windows of a truncated encoding: what it holds and what was cut off."""
        return cls(text, [encoding, *encoding.overflowing], overlap)

    def combined(self, predictions: Sequence[Prediction]) -> Prediction:
        """One prediction from those of the windows, by the rules at the top of this module.

        Args:
            predictions: one a window, in their order.
        """
        if len(self.windows) == 1:
            return predictions[0]
        whole = _Whole(self.windows, self.overlap)
        scores = np.full(whole.length, -np.inf, dtype=np.float32)
        for start, prediction in zip(whole.starts, predictions, strict=True):
            for piece in prediction.pieces:
                index = start + piece.position
                scores[index] = max(scores[index], piece.score)
        kept = np.flatnonzero(scores > -np.inf)
        votes = whole.votes()
        probabilities = {
            label: float(np.average([prediction.probabilities[label] for prediction in predictions], weights=votes))
            for label in predictions[0].probabilities
        }
        return Prediction(
            label=max(probabilities, key=probabilities.__getitem__),
            probabilities=probabilities,
            rationale=merged_spans(self.text, whole, kept, scores),
            rate=len(kept) / (whole.length - sum(whole.special_tokens_mask)),
            truncated=False,
            text=self.text,
            pieces=kept_pieces(whole, kept, scores),
        )


class _Whole:
    """The encoding that the text would have if the model read any length, put together from its windows."""

    def __init__(self, windows: Sequence[Encoding], overlap: int) -> None:
        leading, trailing = _specials_around(windows[0])
        self.starts: list[int] = []
        """Where each window's first token lies in the whole."""
        self._spans: list[tuple[int, int]] = []
        self.tokens: list[str] = []
        self.offsets: list[tuple[int, int]] = []
        self.word_ids: list[int | None] = []
        self.special_tokens_mask: list[int] = []
        for number, window in enumerate(windows):
            read = len(window.ids) - leading - trailing
            begin = len(self.tokens) - overlap if number else leading  # of the window's own tokens, in the whole
            self.starts.append(begin - leading)
            self._spans.append((begin, begin + read))
            first = leading + overlap if number else 0
            last = len(window.ids) - (trailing if number < len(windows) - 1 else 0)
            self.tokens += window.tokens[first:last]
            self.offsets += window.offsets[first:last]
            self.word_ids += window.word_ids[first:last]
            self.special_tokens_mask += window.special_tokens_mask[first:last]

    @property
    def length(self) -> int:
        """Tokens, the special ones at both ends included."""
        return len(self.tokens)

    def votes(self) -> np.ndarray:
        """(windows,) float64: the tokens each window read, those read twice counted half."""
        readers = np.zeros(self.length)
        for begin, end in self._spans:
            readers[begin:end] += 1
        return np.array([np.sum(1 / readers[begin:end]) for begin, end in self._spans])


def _specials_around(window: Encoding) -> tuple[int, int]:
    """How many special tokens stand before and after a window's own."""
    own = [index for index, special in enumerate(window.special_tokens_mask) if not special]
    return own[0], len(window.ids) - 1 - own[-1]
