"""Many texts or images -> batches, texts of similar length, and the answers back in their order. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rekd_train.prediction import Prediction
from rekd_train.preprocess import EncodedTexts, TextPreprocessor
from rekd_train.preprocessors import Encoded, Preprocessor


def length_batches(
    preprocessor: TextPreprocessor, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], EncodedTexts]]:
    """Batches of texts that share a padded length, shortest first, with the places of their texts.

    Every text is checked before the first batch comes, so a bad one costs no work.

    Raises:
        InputError: an empty list or a text that cannot be used, by its index.
    """
    encodings = preprocessor.encode_checked(texts)
    groups: dict[int, list[int]] = {}
    for place in sorted(range(len(texts)), key=lambda place: len(encodings[place].ids)):
        groups.setdefault(preprocessor.bucket(len(encodings[place].ids)), []).append(place)
    for places in groups.values():
        for start in range(0, len(places), batch_size):
            chunk = places[start : start + batch_size]
            yield chunk, preprocessor.batch([texts[i] for i in chunk], [encodings[i] for i in chunk])


def item_batches(
    preprocessor: Preprocessor, items: Sequence[Any], batch_size: int
) -> Iterator[tuple[list[int], Encoded]]:
    """Batches of texts as ``length_batches``; of images in their order, each read when its turn comes.

    Raises:
        InputError: an empty list, or an item that cannot be used, by its index.
    """
    if isinstance(preprocessor, TextPreprocessor):
        yield from length_batches(preprocessor, items, batch_size)
        return
    items = preprocessor.check_items(items)
    for start in range(0, len(items), batch_size):
        chunk = items[start : start + batch_size]
        yield list(range(start, start + len(chunk))), preprocessor(chunk, first_index=start)


def predict_batches(
    preprocessor: Preprocessor,
    items: Sequence[Any],
    batch_size: int,
    answer: Callable[[Encoded], list[Prediction]],
) -> list[Prediction]:
    """Answer every text or image, a batch at a time; predictions in the order of ``items``.

    Raises:
        InputError: an empty list or an item that cannot be used, by its index.
    """
    predictions: dict[int, Prediction] = {}
    for places, encoded in item_batches(preprocessor, items, batch_size):
        for place, prediction in zip(places, answer(encoded), strict=True):
            predictions[place] = prediction
    return [predictions[place] for place in range(len(predictions))]
