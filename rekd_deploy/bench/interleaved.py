"""Timing several ways to do the same on a machine that is not quiet.

Every round runs each way once, in an order that turns from round to round, so whatever disturbs the machine
disturbs all of them alike. A figure is a median over rounds; a comparison is the median of the rounds' own
ratios, with an interval from resampling the rounds. torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rekd_train.errors import ConfigError

_RESAMPLES = 2000


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each way in each round."""

    milliseconds: dict[str, np.ndarray]
    """(rounds,) float64 by way."""

    def figures(self, name: str) -> dict[str, float]:
        """Percentiles of one way: ``p50``, ``p90``, ``p95``, ``p99`` in milliseconds."""
        return percentiles(self.milliseconds[name])

    def ratio(self, name: str, baseline: str, seed: int = 0) -> dict[str, float]:
        """How long ``name`` takes in units of ``baseline``: ``ratio``, and ``low`` and ``high`` of its 95 % interval.

        The median over rounds of the ratio within a round; the interval is the bootstrap's (2,000 resamples).
        """
        ratios = self.milliseconds[name] / self.milliseconds[baseline]
        low, high = median_interval(ratios, seed)
        return {"ratio": float(np.median(ratios)), "low": low, "high": high}


def median_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median of ``values`` (n,), by resampling them 2,000 times."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), (2.5, 97.5))
    return float(low), float(high)


def percentiles(milliseconds: np.ndarray) -> dict[str, float]:
    """``p50``, ``p90``, ``p95``, ``p99`` of (n,) values."""
    return {f"p{level}": float(np.percentile(milliseconds, level)) for level in (50, 90, 95, 99)}


def interleaved(
    ways: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    warmup_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[int], None] = lambda done: None,
) -> Timings:
    """Time each way once a round.

    Args:
        ways: by name; called with the number of the round, so that they may take other inputs each time.
        rounds: at least 3.
        warmup_seconds: each way runs for so long, and once in any case, before the first round.
        clock: seconds; replaced in tests.
        report: called with the number of rounds that are done.

    Raises:
        ConfigError: too few rounds for a median.
    """
    if rounds < 3:
        raise ConfigError(f"{rounds} rounds are too few for a median; at least 3")
    for way in ways.values():
        begun = clock()
        way(0)
        while clock() - begun < warmup_seconds:
            way(0)
    names = list(ways)
    milliseconds = {name: np.empty(rounds) for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = clock()
            ways[name](turn)
            milliseconds[name][turn] = 1000 * (clock() - begun)
        report(turn + 1)
    return Timings(milliseconds)
