"""Load: a closed and an open loop whose responses are compared, one by one, with the pipeline's. torch-free.

A closed loop slows down with what it measures: while a response is late, its client sends nothing, and the lateness is
seen once. An open loop settles its arrivals beforehand and counts each latency from the moment that its request was
*to be* sent, so a stall is paid by everyone who would have come meanwhile. perf_analyzer, whose figures stand beside
these, counts from the sending, compares nothing and takes tensors of one shape.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rekd_deploy.bench.variants import with_interval
from rekd_deploy.parity.reference import agreement
from rekd_train.errors import ConfigError, RekdError
from rekd_train.inputs.prediction import Prediction

Predict = Callable[[list[Any]], list[Prediction]]
"""Predictions for a list of texts or images; called from several threads at once."""
Send = Callable[[int], object]
"""Sends the request of a number and waits for its response."""
_DRAWN = 1009
"""Different requests before they repeat; a prime, so that clients in step do not get the same few."""
_IN_FLIGHT = 128
"""Most requests of an open loop that are on their way at once; more wait, and their waiting is counted."""


@dataclass
class Load:
    """What came of it. Every time is counted once the warm-up is over."""

    milliseconds: list[float] = field(default_factory=list)
    """From when a request was to be sent until its response was there."""
    answered: int = 0
    """Responses within ``seconds``: in a closed loop some to requests of the warm-up, and not the last ones."""
    seconds: float = 0.0
    """Of a closed loop: how long it was counted. Of an open loop: from the first moment to the last response."""
    failed: int = 0
    """Requests that ended in an error; they have no latency."""
    errors: set[str] = field(default_factory=set)
    late_ms: list[float] = field(default_factory=list)
    """Of an open loop: how long after its moment a request was sent; part of its latency."""

    @property
    def per_second(self) -> float:
        """Responses a second."""
        return self.answered / self.seconds if self.seconds else 0.0

    def add(self, moment: float, done: float, error: str | None, late: float = 0.0) -> None:
        """Count a request."""
        if error is not None:
            self.failed += 1
            self.errors.add(error)
            return
        self.milliseconds.append(1000 * (done - moment))
        self.late_ms.append(1000 * late)

    def figures(self) -> dict[str, Any]:
        """For JSON: ``milliseconds`` (p50 with low and high, p90, p95, p99, max), ``per_second``, ``answers``,
        ``failed``, ``errors`` (the first few); no milliseconds where everything failed."""
        times = np.array(self.milliseconds)
        return {
            "milliseconds": {**with_interval(times), "max": float(times.max())} if len(times) else None,
            "per_second": self.per_second, "answers": len(times), "failed": self.failed,
            "errors": sorted(self.errors)[:3],
        }  # fmt: skip


def merged(loads: Sequence[Load]) -> Load:
    """Several loads of one kind as one: their responses, the sum of their seconds."""
    whole = Load()
    for load in loads:
        for name, value in vars(load).items():
            setattr(whole, name, getattr(whole, name) | value if name == "errors" else getattr(whole, name) + value)
    return whole


def closed_loop(
    send: Send, *, concurrency: int, seconds: float, warmup_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Load:  # fmt: skip
    """``concurrency`` clients, each of which sends again as soon as the response is there.

    Raises:
        ConfigError: no client, or no time.
        RekdError: the first request fails; later failures are counted.
    """
    if concurrency < 1 or not seconds > 0:
        raise ConfigError(f"{concurrency} clients for {seconds:g} s measure nothing; at least 1, for longer than 0 s")
    send(0)
    counted = clock() + warmup_seconds
    end = counted + seconds
    loads = [Load() for _ in range(concurrency)]

    def work(number: int, own: Load) -> None:
        while (sent := clock()) < end:
            error = _error_of(send, number)
            done = clock()
            if sent >= counted:
                own.add(sent, done, error)
            own.answered += error is None and counted < done <= end
            number += concurrency

    threads = [threading.Thread(target=work, args=each, daemon=True) for each in enumerate(loads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = merged(loads)
    # counted over the whole window: from the first request to the last response it would be the longer, the fewer
    # clients are still busy at the end
    whole.seconds = seconds
    return whole


def poisson_arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """(n,) moments in seconds from 0 to ``seconds``, at ``rate`` a second, each independent of the others.

    Raises:
        ConfigError: no rate or no time.
    """
    if not (rate > 0 and seconds > 0):
        raise ConfigError(f"{rate:g} requests a second for {seconds:g} s are none; give numbers above 0")
    generator = np.random.default_rng(seed)
    count = generator.poisson(rate * seconds)
    return np.sort(generator.uniform(0.0, seconds, size=count))  # given their number, arrivals are uniform


def open_loop(send: Send, arrivals: np.ndarray, *, warmup_seconds: float = 0.0, in_flight: int = _IN_FLIGHT) -> Load:
    """Send each request at its moment, whatever has become of those before.

    Args:
        arrivals: (n,) seconds from the start, ascending.
        warmup_seconds: requests before that moment are sent, not counted.

    Raises:
        RekdError: a first request, sent before the loop, fails; later failures are counted.
    """
    send(0)
    load, lock, last = Load(), threading.Lock(), 0.0
    begun = time.perf_counter() + 0.05

    def work(number: int, moment: float) -> None:
        nonlocal last
        sent = time.perf_counter()
        error = _error_of(send, number)
        done = time.perf_counter()
        if moment - begun >= warmup_seconds:
            with lock:
                load.add(moment, done, error, late=sent - moment)
                last = max(last, done)

    with ThreadPoolExecutor(in_flight, thread_name_prefix="rekd-load") as pool:
        for number, arrival in enumerate(arrivals):
            moment = begun + float(arrival)
            while (left := moment - time.perf_counter()) > 0:
                time.sleep(left)
            pool.submit(work, number, moment)
    load.answered, load.seconds = len(load.milliseconds), max(0.0, last - begun - warmup_seconds)
    return load


def _error_of(send: Send, number: int) -> str | None:
    try:
        send(number)
    except RekdError as error:
        return str(error)
    return None


# requests, and whether the responses are the model's own


class RequestMix:
    """A fixed sequence of requests that mixes items, and so lengths, and batch sizes.

    Args:
        items: texts or images.
        batch_sizes: each request has one of them.

    Raises:
        ConfigError: a batch size below 1.
    """

    def __init__(self, items: Sequence[Any], batch_sizes: Sequence[int] = (1,), seed: int = 0) -> None:
        if not batch_sizes or min(batch_sizes) < 1:
            raise ConfigError(f"batch sizes {list(batch_sizes)} make no request; give numbers from 1")
        generator = np.random.default_rng(seed)
        sizes = generator.choice(np.asarray(batch_sizes), size=_DRAWN)
        order = np.concatenate([generator.permutation(len(items)) for _ in range(int(sizes.sum()) // len(items) + 1)])
        self.items = items
        self._indices = [part.tolist() for part in np.split(order, np.cumsum(sizes))[:_DRAWN]]

    def indices(self, number: int) -> list[int]:
        """The items in the request of a number."""
        return self._indices[number % _DRAWN]

    def __call__(self, number: int) -> list[Any]:
        """The request of a number."""
        return [self.items[index] for index in self.indices(number)]


class Recorded:
    """Sends, and keeps every response; they are compared after the load, so that comparing does not disturb it.

    Args:
        expected: the prediction for each item of the mix.
        bias: of the decision rule, for near-ties.
    """

    def __init__(self, mix: RequestMix, predict: Predict, expected: Sequence[Prediction], bias: float | None) -> None:
        self.mix = mix
        self._predict, self._expected, self._bias = predict, expected, bias
        self._responses: list[tuple[int, list[Prediction]]] = []

    def __call__(self, number: int) -> None:
        """Send the request of a number."""
        self._responses.append((number, self._predict(self.mix(number))))

    def compare(self) -> np.ndarray:
        """(2,) predictions equal to those expected (``agreement.py``), and all; then forgets them."""
        responses, self._responses = self._responses, []
        counts = np.zeros(2, int)
        for number, found in responses:
            wanted = [self._expected[index] for index in self.mix.indices(number)]
            counts += agreement(found, wanted, self._bias), len(wanted)
        return counts
