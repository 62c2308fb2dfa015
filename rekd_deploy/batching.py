"""Splitting texts into the requests that a server takes: similar lengths together, padded to a bucket. torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rekd_train.preprocess import EncodedTexts, TextPreprocessor


@dataclass(frozen=True)
class Batch:
    """Some of the texts and where they stood."""

    indices: list[int]
    """Place of each row among the texts as given."""
    encoded: EncodedTexts
    """The rows, padded to the smallest bucket that fits the longest."""


def batches(preprocessor: TextPreprocessor, texts: Sequence[str], size: int, first_index: int = 0) -> list[Batch]:
    """Split texts into batches of at most ``size``, short texts first.

    Args:
        first_index: what messages call the first text.

    Raises:
        InputError: an empty list or a text that cannot be used, by its index.
    """
    whole = preprocessor(texts, preprocessor.settings.max_length, first_index)
    lengths = [len(encoding.ids) for encoding in whole.encodings]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [
        Batch(rows, _rows(whole, rows, _bucket(preprocessor, lengths[rows[-1]])))
        for rows in (order[start : start + size] for start in range(0, len(order), size))
    ]


def _bucket(preprocessor: TextPreprocessor, length: int) -> int:
    return next(bucket for bucket in preprocessor.settings.buckets if bucket >= length)


def _rows(whole: EncodedTexts, rows: list[int], width: int) -> EncodedTexts:
    return EncodedTexts(
        inputs={name: array[rows, :width] for name, array in whole.inputs.items()},
        texts=[whole.texts[row] for row in rows],
        encodings=[whole.encodings[row] for row in rows],
        truncated=[whole.truncated[row] for row in rows],
    )
