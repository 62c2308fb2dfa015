"""Load on something that answers: closed (each asker waits for its answer) and open (askers come when they come).

A closed loop slows down with what it measures: while an answer is late, nobody else asks, and the lateness is seen
once. An open loop has its arrivals settled beforehand, and counts each latency from the moment that its request was
*to be* sent, so a stall is paid by everyone who would have come meanwhile. torch-free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from rekd_train.errors import ConfigError, RekdError

Ask = Callable[[int], object]
"""Sends the request of a number and waits for its answer."""
_ASKERS = 128
"""Most requests of an open loop that are on their way at once; more wait, and their waiting is counted."""


@dataclass
class Load:
    """What came of it. Every time is counted once the warm-up is over."""

    milliseconds: np.ndarray
    """(n,) from when a request was to be sent until its answer was there."""
    answered: int
    """Answers within ``seconds``: in a closed loop some to questions of the warm-up, and not the last ones."""
    seconds: float
    """Of a closed loop: how long it was counted. Of an open loop: from the first moment to the last answer."""
    failed: int = 0
    """Requests that were answered with an error; they have no latency."""
    errors: list[str] = field(default_factory=list)
    """The first few, each once."""
    late_ms: np.ndarray = field(default_factory=lambda: np.empty(0))
    """(n,) of an open loop: how long after its moment a request was sent; part of its latency."""

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds if self.seconds else 0.0


def merged(loads: Sequence[Load]) -> Load:
    """Several loads of one kind as one: their answers, the sum of their seconds."""
    return Load(
        np.concatenate([load.milliseconds for load in loads]),
        sum(load.answered for load in loads),
        sum(load.seconds for load in loads),
        sum(load.failed for load in loads),
        sorted({error for load in loads for error in load.errors})[:3],
        np.concatenate([load.late_ms for load in loads]),
    )


def closed_loop(
    ask: Ask, *, concurrency: int, seconds: float, warmup_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Load:  # fmt: skip
    """``concurrency`` askers, each of whom asks again as soon as the answer is there.

    Raises:
        ConfigError: nobody asks, or no time.
        RekdError: the first request fails; later failures are counted.
    """
    if concurrency < 1 or not seconds > 0:
        raise ConfigError(f"{concurrency} askers for {seconds:g} s measure nothing; at least 1, for longer than 0 s")
    ask(0)
    begun = clock()
    counted, end = begun + warmup_seconds, begun + warmup_seconds + seconds
    notes = [_Notes() for _ in range(concurrency)]

    def work(place: int) -> None:
        number, own = place, notes[place]
        while (sent := clock()) < end:
            error = _error_of(ask, number)
            done = clock()
            if sent >= counted:
                own.add(sent, done, error)
            own.answered += error is None and counted < done <= end
            number += concurrency

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # counted over the whole window: from the first question to the last answer it would be the longer, the fewer askers
    # are still busy at the end
    return _gathered(notes, sum(each.answered for each in notes), seconds)


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


def open_loop(ask: Ask, arrivals: np.ndarray, *, warmup_seconds: float = 0.0, askers: int = _ASKERS) -> Load:
    """Send each request at its moment, whatever has become of those before.

    Args:
        arrivals: (n,) seconds from the start, ascending.
        warmup_seconds: requests before that moment are sent, not counted.
        askers: see ``_ASKERS``.

    Raises:
        RekdError: a first request, sent before the loop, fails; later failures are counted.
    """
    ask(0)
    notes, lock = _Notes(), threading.Lock()
    begun = time.perf_counter() + 0.05

    def work(number: int, moment: float) -> None:
        sent = time.perf_counter()
        error = _error_of(ask, number)
        done = time.perf_counter()
        if moment - begun >= warmup_seconds:
            with lock:
                notes.add(moment, done, error, late=sent - moment)

    with ThreadPoolExecutor(askers, thread_name_prefix="rekd-load") as pool:
        for number, arrival in enumerate(arrivals):
            moment = begun + float(arrival)
            while (left := moment - time.perf_counter()) > 0:
                time.sleep(left)
            pool.submit(work, number, moment)
    return _gathered([notes], len(notes.milliseconds), max(0.0, notes.last - begun - warmup_seconds))


@dataclass
class _Notes:
    """What one asker saw."""

    milliseconds: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    failed: int = 0
    errors: set[str] = field(default_factory=set)
    answered: int = 0
    last: float = 0.0

    def add(self, moment: float, done: float, error: str | None, late: float = 0.0) -> None:
        self.last = max(self.last, done)
        if error is not None:
            self.failed += 1
            if len(self.errors) < 3:
                self.errors.add(error)
            return
        self.milliseconds.append(1000 * (done - moment))
        self.late.append(1000 * late)


def _error_of(ask: Ask, number: int) -> str | None:
    try:
        ask(number)
    except RekdError as error:
        return str(error)
    return None


def _gathered(notes: list[_Notes], answered: int, seconds: float) -> Load:
    errors = sorted(set().union(*(each.errors for each in notes)))
    return Load(
        np.array([value for each in notes for value in each.milliseconds]),
        answered,
        seconds,
        sum(each.failed for each in notes),
        errors[:3],
        np.array([value for each in notes for value in each.late]),
    )
