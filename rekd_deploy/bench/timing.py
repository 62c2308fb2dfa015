"""Timing on a machine that is not quiet: variants in rounds, and load in a closed and an open loop. torch-free.

Every round runs each variant once, in an order that shifts, so whatever disturbs the machine disturbs all alike. A
figure is a median over rounds; a comparison is that of the rounds' own ratios, with an interval from resampling them.

A closed loop slows down with what it measures: while a response is late, its client sends nothing, and the lateness is
seen once. An open loop settles its arrivals beforehand and counts each latency from the moment that its request was
*to be* sent, so a stall is paid by everyone who would have come meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rekd_train.errors import ConfigError, RekdError

Send = Callable[[int], object]
"""Sends the request of a number and waits for its response."""
_RESAMPLES = 2000
_IN_FLIGHT = 128
"""Most requests of an open loop that are on their way at once; more wait, and their waiting is counted."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds, (rounds,) float64, by variant."""

    milliseconds: dict[str, np.ndarray]

    def ratio(self, name: str, baseline: str) -> dict[str, float]:
        """Time of ``name`` in units of ``baseline``: the median of the rounds' own ratios and its 95 % interval."""
        return median_figures(self.milliseconds[name] / self.milliseconds[baseline], "ratio")


def median_figures(values: np.ndarray, name: str = "p50") -> dict[str, float]:
    """The median of (n,) values under ``name``; ``low`` and ``high`` of its 95 % interval, by resampling them."""
    # as scipy.stats.bootstrap finds it; the GPU machine of benchmarks/gpu.py has no scipy
    drawn = np.random.default_rng(0).integers(0, len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), (2.5, 97.5))
    return {name: float(np.median(values)), "low": float(low), "high": float(high)}


def percentiles(milliseconds: np.ndarray) -> dict[str, float]:
    """``p50``, ``p90``, ``p95``, ``p99`` of (n,) values."""
    return {f"p{level}": float(np.percentile(milliseconds, level)) for level in (50, 90, 95, 99)}


def with_interval(milliseconds: np.ndarray) -> dict[str, float]:
    """Percentiles of (n,) times, and ``low`` and ``high`` of the median."""
    return {**percentiles(milliseconds), **median_figures(milliseconds)}


def in_rounds(
    variants: Mapping[str, Callable[[int], object]], *, rounds: int, warmup_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter, report: Callable[[int], None] = lambda done: None,
) -> Timings:  # fmt: skip
    """Time each variant once a round.

    Args:
        variants: by name; called with the number of the round, so that they may take other inputs each time.
        rounds: at least 3.
        warmup_seconds: each variant runs for so long, and once in any case, before the first round.
        report: called with the number of rounds that are done.

    Raises:
        ConfigError: too few rounds for a median.
    """
    if rounds < 3:
        raise ConfigError(f"{rounds} rounds are too few for a median; at least 3")
    for variant in variants.values():
        begun = clock()
        variant(0)
        while clock() - begun < warmup_seconds:
            variant(0)
    names = list(variants)
    milliseconds = {name: np.empty(rounds) for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begun = clock()
            variants[name](number)
            milliseconds[name][number] = 1000 * (clock() - begun)
        report(number + 1)
    return Timings(milliseconds)


# load


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

    @property
    def per_second(self) -> float:
        """Responses a second."""
        return self.answered / self.seconds if self.seconds else 0.0

    def add(self, moment: float, done: float, error: str | None) -> None:
        """Count a request; times in seconds."""
        if error is None:
            self.milliseconds.append(1000 * (done - moment))
        else:
            self.failed, self.errors = self.failed + 1, self.errors | {error}

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

    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(work, range(concurrency), loads))
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
        error = _error_of(send, number)
        done = time.perf_counter()
        if moment - begun >= warmup_seconds:
            with lock:
                load.add(moment, done, error)
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
