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


class Batches:
    """Everything of one call, as batches of one padded length; and the predictions put together again.

    Iterating gives batches and the indices of what they hold: of texts the shortest first, each checked before the
    first batch comes; of images in their order, each read when its turn comes.

    Args:
        preprocessor: of the model.
        items: texts or images.
        batch_size: most items, or windows of a text, in a batch.
        windows: read texts beyond the model's length window by window (``windows.py``) instead of cutting them.

    Raises:
        InputError: while iterating: an empty list, items that cannot be used, by their number, or windows of an image.
    """

    def __init__(
        self, preprocessor: Preprocessor, items: Sequence[Any], batch_size: int, *, windows: bool = False
    ) -> None:
        self._preprocessor = preprocessor
        self._items = items
        self._batch_size = batch_size
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
        for start in range(0, len(items), self._batch_size):
            chunk = items[start : start + self._batch_size]
            yield list(range(start, start + len(chunk))), preprocessor(chunk, first_index=start)

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
        groups: dict[int, list[int]] = {}
        for index in sorted(range(len(texts)), key=lambda index: len(encodings[index])):
            groups.setdefault(preprocessor.bucket(len(encodings[index])), []).append(index)
        for indices in groups.values():
            for start in range(0, len(indices), self._batch_size):
                chunk = indices[start : start + self._batch_size]
                yield chunk, preprocessor.batch([texts[i] for i in chunk], [encodings[i] for i in chunk])
