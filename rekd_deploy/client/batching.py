"""Many texts or images -> batches, texts of similar length, and the predictions back in their order. torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Encoding

from rekd_deploy.client.windows import WindowedText
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Prediction
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
        preprocessor: of the model.
        items: texts or images.
        batch_size: most items, or windows of a text, in a batch.
        windows: read texts beyond the model's length window by window (``windows.py``) instead of cutting them.
        filled_to: sizes that whoever computes fills batches up to, as captured graphs need; empty: none.

    Raises:
        InputError: while iterating: an empty list, items that cannot be used, by their number, or windows of an image.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        items: Sequence[Any],
        batch_size: int,
        *,
        windows: bool = False,
        filled_to: Sequence[int] = (),
    ) -> None:
        self._preprocessor = preprocessor
        self._items = items
        self._sizes = batch_size, filled_to
        self._windows = windows
        self._windowed: list[WindowedText] = []
        self._predictions: dict[int, Prediction] = {}

    def __iter__(self) -> Iterator[tuple[list[int], Encoded]]:
        preprocessor, items = self._preprocessor, self._items
        if isinstance(preprocessor, TextPreprocessor):
            encodings = preprocessor.encode_checked(items)
            yield from self._windowed_texts(preprocessor, encodings) if self._windows else self._grouped(
                preprocessor, items, encodings
            )
            return
        if self._windows:
            raise InputError("windows are for texts, and this model reads images; fix: leave windows out")
        items = preprocessor.check_items(items)
        for start, end in cuts([preprocessor.positions] * len(items), *self._sizes):
            yield list(range(start, end)), preprocessor(items[start:end], first_index=start)

    def collect(self, indices: Sequence[int], predictions: Sequence[Prediction]) -> None:
        """Take the predictions of a batch."""
        self._predictions.update(zip(indices, predictions, strict=True))

    def predictions(self) -> list[Prediction]:
        """One prediction an item, in the order of the items, once those of every batch are collected."""
        ordered = [self._predictions[index] for index in range(len(self._predictions))]
        if not self._windowed:
            return ordered
        parts = iter(ordered)
        return [each.combined([next(parts) for _ in each.windows]) for each in self._windowed]

    def _windowed_texts(
        self, preprocessor: TextPreprocessor, encodings: Sequence[Encoding]
    ) -> Iterator[tuple[list[int], Encoded]]:
        self._windowed = [
            WindowedText.of(text, encoding, preprocessor.window_overlap)
            for text, encoding in zip(self._items, encodings, strict=True)
        ]
        windows = [window for each in self._windowed for window in each.windows]
        texts = [each.text for each in self._windowed for _ in each.windows]
        return self._grouped(preprocessor, texts, windows)

    def _grouped(
        self, preprocessor: TextPreprocessor, texts: Sequence[str], encodings: Sequence[Encoding]
    ) -> Iterator[tuple[list[int], Encoded]]:
        order = sorted(range(len(texts)), key=lambda index: len(encodings[index]))
        lengths = [preprocessor.bucket(len(encodings[index])) for index in order]
        for start, end in cuts(lengths, *self._sizes):
            chunk = order[start:end]
            yield chunk, preprocessor.batch([texts[i] for i in chunk], [encodings[i] for i in chunk])


def cuts(lengths: Sequence[int], batch_size: int, filled_to: Sequence[int]) -> list[tuple[int, int]]:
    """Where each batch of items with these ascending padded lengths starts and ends.

    Without ``filled_to`` a batch has one length. With it the batches are the cheapest ones: the first alone need be
    filled up, since in any other a shorter item costs no more than a repeated row does.
    """
    if not filled_to:
        starts = [0]
        for place, length in enumerate(lengths):
            if length != lengths[starts[-1]] or place - starts[-1] == batch_size:
                starts.append(place)
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
