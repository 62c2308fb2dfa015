"""The closed loop, served and in process in turns: throughput beside each other on a machine that is not quiet.

    concurrency
    load figures      of the served model: see ``load_figures``
    steps             by model, from the server (see server_steps)
    equal, compared   answers that are the pipeline's own, and all answers, those of the warm-ups among them
    in_process        load figures of the same pipeline, called by as many threads with the same requests
    throughput        served in units of in process: ``ratio``, the median of the turns', ``low`` and ``high``

The last two are null where the server was given: it may run elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rekd_deploy.bench.interleaved import median_interval
from rekd_deploy.bench.latency_figures import with_interval
from rekd_deploy.bench.load import Ask, Load, closed_loop, merged
from rekd_deploy.bench.request_mix import Predict, Recorded, RequestMix
from rekd_deploy.bench.server_steps import read_totals, steps_between
from rekd_train.inputs.prediction import Prediction


@dataclass(frozen=True)
class ClosedTurns:
    """How it is measured."""

    mix: RequestMix
    served: Predict
    in_process: Predict | None
    """The pipeline; None: leave it out."""
    expected: Sequence[Prediction]
    """The pipeline's answer to each item."""
    bias: float | None
    """Of the decision rule, for near-ties."""
    seconds: float
    """Of each concurrency, shared by the turns."""
    warmup_seconds: float
    """Of each turn, not counted."""
    turns: int

    def measure(self, concurrency: int, url: str, report: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Figures as described above.

        Args:
            url: gRPC address of the server, for its statistics.
            report: called with the number of turns that are done.

        Raises:
            RekdError: a first request fails; later failures are counted.
        """
        served, there = Recorded(self.mix, self.served), self.in_process
        ways: dict[str, Ask] = {"served": served}
        if there is not None:
            ways["in process"] = lambda number: there(self.mix(number))
        equal = compared = 0
        loads: dict[str, list[Load]] = {name: [] for name in ways}
        before = read_totals(url)
        for turn in range(self.turns):
            for name in list(ways) if turn % 2 == 0 else reversed(ways):
                loads[name].append(closed_loop(
                    ways[name], concurrency=concurrency, seconds=self.seconds / self.turns,
                    warmup_seconds=self.warmup_seconds,
                ))  # fmt: skip
            found = served.judge(self.expected, self.bias)
            equal, compared = equal + found[0], compared + found[1]
            report(turn + 1)
        steps = steps_between(before, read_totals(url))
        beside = loads.get("in process")
        return {
            "concurrency": concurrency,
            **load_figures(merged(loads["served"])),
            "steps": steps,
            "equal": equal,
            "compared": compared,
            "in_process": load_figures(merged(beside)) if beside else None,
            "throughput": _ratio(loads["served"], beside) if beside else None,
        }


def load_figures(load: Load) -> dict[str, Any]:
    """A load for JSON: ``milliseconds`` (p50 with low and high, p90, p95, p99, max), ``per_second``, ``answers``,
    ``failed``, ``errors``; no milliseconds where everything failed."""
    times = load.milliseconds
    return {
        "milliseconds": {**with_interval(times), "max": float(times.max())} if len(times) else None,
        "per_second": load.per_second,
        "answers": len(times),
        "failed": load.failed,
        "errors": load.errors,
    }


def _ratio(served: Sequence[Load], there: Sequence[Load]) -> dict[str, float] | None:
    """None: in some turn no answer was counted in process."""
    if not all(load.per_second for load in there):
        return None
    ratios = np.array([ours.per_second / theirs.per_second for ours, theirs in zip(served, there, strict=True)])
    low, high = median_interval(ratios)
    return {"ratio": float(np.median(ratios)), "low": low, "high": high}
