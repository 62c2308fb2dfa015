"""The requests of a load, one for each number, and what became of them: are the answers the model's own? torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rekd_deploy.parity.agreement import agreement
from rekd_train.errors import ConfigError
from rekd_train.inputs.prediction import Prediction

Predict = Callable[[list[Any]], list[Prediction]]
"""Answers a list of texts or images."""
_DRAWN = 1009
"""Different requests before they repeat; a prime, so that askers in step do not get the same few."""


class RequestMix:
    """A fixed sequence of requests that mixes items, and so lengths, and batch sizes.

    Args:
        items: texts or images.
        batch_sizes: each request has one of them.
        seed: of the mixture.

    Raises:
        ConfigError: a batch size below 1.
    """

    def __init__(self, items: Sequence[Any], batch_sizes: Sequence[int] = (1,), seed: int = 0) -> None:
        if not batch_sizes or min(batch_sizes) < 1:
            raise ConfigError(f"batch sizes {list(batch_sizes)} make no request; give numbers from 1")
        generator = np.random.default_rng(seed)
        sizes = generator.choice(np.asarray(batch_sizes), size=_DRAWN)
        order = np.concatenate([generator.permutation(len(items)) for _ in range(int(sizes.sum()) // len(items) + 1)])
        ends = np.cumsum(sizes)
        self.items = items
        self._places = [order[end - size : end].tolist() for size, end in zip(sizes, ends, strict=True)]

    def places(self, number: int) -> list[int]:
        """Which items the request of a number asks about."""
        return self._places[number % _DRAWN]

    def __call__(self, number: int) -> list[Any]:
        """The request of a number."""
        return [self.items[place] for place in self.places(number)]


class Recorded:
    """Asks, and keeps every answer; they are judged after the load, so that judging does not disturb it.

    Args:
        mix: what is asked.
        predict: who answers; from several threads at once.
    """

    def __init__(self, mix: RequestMix, predict: Predict) -> None:
        self._mix, self._predict = mix, predict
        self._answers: list[tuple[int, list[Prediction]]] = []

    def __call__(self, number: int) -> None:
        """Ask the request of a number."""
        self._answers.append((number, self._predict(self._mix(number))))

    def judge(self, expected: Sequence[Prediction], bias: float | None) -> tuple[int, int]:
        """Answers equal to those expected of each item (``agreement.py``), and all answers; then forgets them."""
        answers, self._answers = self._answers, []
        equal = total = 0
        for number, found in answers:
            wanted = [expected[place] for place in self._mix.places(number)]
            equal += agreement(found, wanted, bias)
            total += len(wanted)
        return equal, total
