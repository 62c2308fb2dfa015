"""Many texts or images -> batches, texts of similar length, and the answers back in their order. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenizers import Encoding

from rekd_deploy.client.windows import WindowedText
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.preprocessors import Encoded, Preprocessor
from rekd_train.inputs.text import EncodedTexts, TextPreprocessor

A_BATCH = 256
"""What one batch more costs, in tokens, where batches are filled up. A low guess, to be measured on a GPU: with it
there are fewer batches and less work than with a batch for every length (benchmarks/results/unpadding.json)."""

class Questions:
    """Everything asked in one call, as batches; and the answers put together again.

    Args:
        preprocessor: of the model.
        items: texts or images.
        batch_size: most items, or windows of a text, in a batch.
        windows: read texts beyond the model's length window by window (``windows.py``) instead of cutting them.
        filled_to: sizes that whoever computes fills batches up to, as captured graphs need; empty: none.
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
        self._answers: dict[int, Prediction] = {}

    def batches(self) -> Iterator[tuple[list[int], Encoded]]:
        """Batches and the places of what they hold: of texts as ``length_batches``; of images in their order, each
        read when its turn comes.

        Raises:
            InputError: an empty list, items that cannot be used, by their number, or windows of an image.
        """
        preprocessor = self._preprocessor
        if isinstance(preprocessor, TextPreprocessor):
            yield from self._window_batches(preprocessor) if self._windows else length_batches(
                preprocessor, self._items, *self._sizes
            )
            return
        if self._windows:
            raise InputError("windows are for texts, and this model reads images; fix: leave windows out")
        items = preprocessor.check_items(self._items)
        for start, end in cuts([preprocessor.positions] * len(items), *self._sizes):
            yield list(range(start, end)), preprocessor(items[start:end], first_index=start)

    def answer(self, places: Sequence[int], predictions: Sequence[Prediction]) -> None:
        """Take the predictions of a batch."""
        self._answers.update(zip(places, predictions, strict=True))

    def answers(self) -> list[Prediction]:
        """One prediction an item, in the order of the items, once every batch is answered."""
        ordered = [self._answers[place] for place in range(len(self._answers))]
        if not self._windowed:
            return ordered
        parts = iter(ordered)
        return [each.combined([next(parts) for _ in each.windows]) for each in self._windowed]

    def _window_batches(self, preprocessor: TextPreprocessor) -> Iterator[tuple[list[int], EncodedTexts]]:
        encodings = preprocessor.encode_checked(self._items)
        self._windowed = [
            WindowedText.of(text, encoding, preprocessor.window_overlap)
            for text, encoding in zip(self._items, encodings, strict=True)
        ]
        windows = [window for each in self._windowed for window in each.windows]
        texts = [each.text for each in self._windowed for _ in each.windows]
        yield from _grouped(preprocessor, texts, windows, *self._sizes)


def length_batches(
    preprocessor: TextPreprocessor, texts: Sequence[str], batch_size: int, filled_to: Sequence[int] = ()
) -> Iterator[tuple[list[int], EncodedTexts]]:
    """Batches of texts that share a padded length, shortest first, with the places of their texts.

    Where batches are filled up, texts that leave one half empty go with longer ones: a row that repeats another costs
    more than a row with padding. Every text is checked before the first batch comes, so a bad one costs no work.

    Raises:
        InputError: an empty list or texts that cannot be used, by their number.
    """
    yield from _grouped(preprocessor, texts, preprocessor.encode_checked(texts), batch_size, filled_to)


def predict_batches(
    preprocessor: Preprocessor,
    items: Sequence[Any],
    batch_size: int,
    answer: Callable[[Encoded], list[Prediction]],
    *,
    windows: bool = False,
    filled_to: Sequence[int] = (),
) -> list[Prediction]:
    """Answer every text or image, a batch at a time; predictions in the order of ``items``.

    Raises:
        InputError: an empty list, items that cannot be used, by their number, or windows of an image.
    """
    questions = Questions(preprocessor, items, batch_size, windows=windows, filled_to=filled_to)
    for places, encoded in questions.batches():
        questions.answer(places, answer(encoded))
    return questions.answers()


def _grouped(
    preprocessor: TextPreprocessor, texts: Sequence[str], encodings: Sequence[Encoding], batch_size: int,
    filled_to: Sequence[int],
) -> Iterator[tuple[list[int], EncodedTexts]]:
    order = sorted(range(len(texts)), key=lambda place: len(encodings[place]))
    lengths = [preprocessor.bucket(len(encodings[place])) for place in order]
    for start, end in cuts(lengths, batch_size, filled_to):
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
