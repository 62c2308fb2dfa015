"""Many texts -> batches of similar length, and the answers back in the order of the texts. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rekd_train.prediction import Prediction
from rekd_train.preprocess import EncodedTexts, TextPreprocessor


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


def predict_batches(
    preprocessor: TextPreprocessor,
    texts: Sequence[str],
    batch_size: int,
    answer: Callable[[EncodedTexts], list[Prediction]],
) -> list[Prediction]:
    """Answer every text, a batch at a time; predictions in the order of ``texts``.

    Raises:
        InputError: an empty list or a text that cannot be used, by its index.
    """
    predictions: dict[int, Prediction] = {}
    for places, encoded in length_batches(preprocessor, texts, batch_size):
        for place, prediction in zip(places, answer(encoded), strict=True):
            predictions[place] = prediction
    return [predictions[place] for place in range(len(texts))]
