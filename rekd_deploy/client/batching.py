"""Many texts or images -> batches, texts of similar length, and the predictions back in their order. torch-free.

A text longer than the model reads is cut, or read in windows of the model's full length, each sharing a quarter with
the one before it (``TextPreprocessor.window_overlap``); the last holds what is left. Their predictions become one by
two rules:

- **Probabilities**: every token of the text has one vote and shares it out among the windows that read it; a class's
  probability is the mean of the windows' probabilities, weighted by their votes. The label is the most probable class.
- **Rationale**: every token that any window kept, for all of these decided and no other. Words are whole, neighbouring
  words are one span, offsets are those of the whole text; a score is the highest that any window which kept the token
  gave it. The rate is kept tokens / tokens of the whole text, and may lie a little above the model's budget, because
  two windows may choose differently where they overlap.

The doubt is that of the whole text's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Encoding

from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Prediction, kept_pieces, merged_spans
from rekd_train.inputs.preprocessors import Encoded, Preprocessor
from rekd_train.inputs.text import TextPreprocessor

A_BATCH = 256
"""What one batch more costs, in tokens, where batches are filled up. A low guess, to be measured on a GPU: with it
there are fewer batches and less work than with a batch for every length (benchmarks/results/unpadding.json)."""


class Batches:
    """Everything of one call, as batches of similar length; and the predictions put together again.

    Iterating gives batches and the indices of what they hold: of texts the shortest first, each checked before the
    first batch comes; of images in their order, each read when its turn comes.

    Args:
        batch_size: most items, or windows of a text, in a batch.
        windows: read texts beyond the model's length window by window instead of cutting them.
        filled_to: sizes that whoever computes fills batches up to, as captured graphs need; empty: none.

    Raises:
        InputError: while iterating: an empty list, items that cannot be used, by their number, or windows of an image.
    """

    def __init__(
        self, preprocessor: Preprocessor, items: Sequence[Any], batch_size: int, *,
        windows: bool = False, filled_to: Sequence[int] = (),
    ) -> None:
        self._preprocessor = preprocessor
        self._items = items
        self._sizes = batch_size, filled_to
        self._windows = windows
        self._windowed: list[WindowedText] = []
        self._predictions: dict[int, Prediction] = {}

    def __iter__(self) -> Iterator[tuple[list[int], Encoded]]:
        preprocessor, items = self._preprocessor, self._items
        if not isinstance(preprocessor, TextPreprocessor):
            if self._windows:
                raise InputError("windows are for texts, and this model reads images; fix: leave windows out")
            items = preprocessor.check_items(items)
            for start, end in cuts([preprocessor.positions] * len(items), *self._sizes):
                yield list(range(start, end)), preprocessor(items[start:end], first_index=start)
            return
        encodings = preprocessor.encode_checked(items)
        if self._windows:
            overlap = preprocessor.window_overlap
            self._windowed = [WindowedText(*each, overlap) for each in zip(items, encodings, strict=True)]
            encodings = [window for each in self._windowed for window in each.windows]
            items = [each.text for each in self._windowed for _ in each.windows]
        order = sorted(range(len(items)), key=lambda index: len(encodings[index]))
        for start, end in cuts([preprocessor.bucket(len(encodings[index])) for index in order], *self._sizes):
            chosen = order[start:end]
            yield chosen, preprocessor.batch([items[i] for i in chosen], [encodings[i] for i in chosen])

    def collect(self, indices: Sequence[int], predictions: Sequence[Prediction]) -> None:
        """Take the predictions of a batch."""
        self._predictions.update(zip(indices, predictions, strict=True))

    def predictions(self) -> list[Prediction]:
        """One prediction an item, in the order of the items, once those of every batch are collected."""
        ordered = [self._predictions[index] for index in range(len(self._predictions))]
        if not self._windowed:
            return ordered
        parts = iter(ordered)
        own = self._preprocessor
        return [each.combined([next(parts) for _ in each.windows], own) for each in self._windowed]


def cuts(lengths: Sequence[int], batch_size: int, filled_to: Sequence[int]) -> list[tuple[int, int]]:
    """Where each batch of items with these ascending padded lengths starts and ends.

    Without ``filled_to`` a batch has one length. With it the batches are the cheapest ones: the first alone need be
    filled up, since in any other a shorter item costs no more than a repeated row does.
    """
    if not filled_to:
        starts = [0]
        for index, length in enumerate(lengths):
            if length != lengths[starts[-1]] or index - starts[-1] == batch_size:
                starts.append(index)
        return list(zip(starts, [*starts[1:], len(lengths)], strict=True))
    costs, before = [0], [0]  # of the cheapest batches of the first n items, and where the last of these starts
    for end, length in enumerate(lengths, 1):
        cost, start = min(
            (costs[start] + rows * length + A_BATCH, start)
            for rows in filled_to for start in [max(0, end - min(rows, batch_size))]
        )
        costs.append(cost)
        before.append(start)
    found, end = [], len(lengths)
    while end:
        found.append((before[end], end))
        end = before[end]
    return found[::-1]


class WindowedText:
    """A text, its windows, and the encoding that it would have if the model read any length.

    ``encoding`` is truncated and holds what was cut off; ``overlap``: tokens that a window shares with the one before.
    """

    def __init__(self, text: str, encoding: Encoding, overlap: int) -> None:
        self.text = text
        self.windows = [encoding, *encoding.overflowing]
        """Each with its special tokens and offsets into the whole text; a short text has one."""
        own = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        leading, specials = own[0], len(encoding) - len(own)
        self.starts = [number * (len(own) - overlap) for number in range(len(self.windows))]
        """Where each window's first token, a special one, would lie in the whole."""
        self._read = [
            slice(start + leading, start + leading + len(window) - specials)
            for start, window in zip(self.starts, self.windows, strict=True)
        ]
        self.real = self._read[-1].stop - leading
        """Tokens of the whole, without the special ones."""
        self._length = self.real + specials

    def whole(self) -> SimpleNamespace:
        """``ids``, ``tokens``, ``offsets`` and ``word_ids`` of the whole text."""
        joined = SimpleNamespace(ids=[], tokens=[], offsets=[], word_ids=[])
        for name, values in vars(joined).items():
            for number, (window, read) in enumerate(zip(self.windows, self._read, strict=True)):
                first = read.start if number else 0
                values[first:] = getattr(window, name)[first - self.starts[number] :]
        return joined

    def votes(self) -> np.ndarray:
        """(windows,) float64: the tokens each window read, those read twice counted half."""
        readers = np.zeros(self._length)
        for read in self._read:
            readers[read] += 1
        return np.array([np.sum(1 / readers[read]) for read in self._read])

    def combined(self, predictions: Sequence[Prediction], preprocessor: TextPreprocessor | None = None) -> Prediction:
        """One prediction from those of the windows, in their order, by the rules at the top of this module.

        ``preprocessor``: who doubts; None: nobody.
        """
        if len(self.windows) == 1:
            return predictions[0]
        scores = np.full(self._length, -np.inf, dtype=np.float32)
        for start, prediction in zip(self.starts, predictions, strict=True):
            for piece in prediction.pieces:
                index = start + piece.position
                scores[index] = max(scores[index], piece.score)
        kept = np.flatnonzero(scores > -np.inf)
        whole, votes = self.whole(), self.votes()
        probabilities = {
            label: float(np.average([prediction.probabilities[label] for prediction in predictions], weights=votes))
            for label in predictions[0].probabilities
        }
        label, spans = max(probabilities, key=probabilities.__getitem__), merged_spans(self.text, whole, kept, scores)
        pieces = kept_pieces(whole, kept, scores)
        doubt = None
        if preprocessor is not None and preprocessor.familiarity is not None:
            doubt = preprocessor.familiarity.doubt(preprocessor.inner(whole.ids))
        return Prediction(label, probabilities, spans, len(kept) / self.real, False, self.text, pieces, doubt)
