"""Times of one cell of the grid as figures, and the check that what was timed computes the same. torch-free.

    rounds
    around          of a batch beside the graphs: ``preprocess`` and ``decode``, percentiles in milliseconds
    ways[]          a form; ``milliseconds`` (p50 with low and high, the 95 % interval of the median; p90, p95, p99),
                    ``items_per_second``, ``steps`` (wall clock by step), ``device_steps`` (events on the GPU)
    ratios[]        ``way``, ``baseline``, ``ratio``, ``low``, ``high``: the median of the rounds' own ratios
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rekd_deploy.bench.forms import Form, Way, comparisons
from rekd_deploy.bench.interleaved import Timings, median_interval, percentiles
from rekd_deploy.bench.results import Check

PREPROCESS, DECODE = "preprocess", "decode"
_CLASSES_ALIKE = 0.98
"""Share of rows on which float32 forms of one model must agree about the class."""


def cell_figures(timings: Timings, ways: Sequence[Way], batch: int, rounds: int) -> dict[str, Any]:
    """A cell, as described above."""
    return {
        "rounds": rounds,
        "around": {name: timings.figures(name) for name in (PREPROCESS, DECODE)},
        "ways": [
            {
                **way.form.to_dict(),
                "milliseconds": with_interval(timings.milliseconds[way.form.name]),
                "items_per_second": 1000 * batch / float(timings.milliseconds[way.form.name].mean()),
                "steps": _percentiles(way.last(rounds)),
                "device_steps": _percentiles(way.last(rounds, "device")),
            }
            for way in ways
        ],
        "ratios": [
            {"way": form.name, "baseline": other.name, **timings.ratio(form.name, other.name)}
            for form, other in comparisons([way.form for way in ways])
        ],
    }


def with_interval(milliseconds: np.ndarray) -> dict[str, float]:
    """Percentiles of (n,) times, and ``low`` and ``high`` of the median."""
    low, high = median_interval(milliseconds)
    return {**percentiles(milliseconds), "low": low, "high": high}


def classes_alike(ways: Sequence[Way], count: int) -> tuple[int, int]:
    """Rows on which float32 forms of a model answer as the first of them does, and all rows that were compared.

    Args:
        count: how many batches there are.
    """
    same = rows = 0
    first: dict[tuple[str, int | None], list[np.ndarray]] = {}
    for way in (way for way in ways if way.form.precision == "fp32"):
        classes = [np.asarray(way(turn)).argmax(axis=1) for turn in range(count)]
        key = _model_of(way.form)
        if key not in first:
            first[key] = classes
            continue
        same += sum(int((ours == theirs).sum()) for ours, theirs in zip(classes, first[key], strict=True))
        rows += sum(map(len, classes))
    return same, rows


def alike_check(alike: Sequence[tuple[int, int]]) -> Check:
    """The check over all cells: what is fast must also be right."""
    same, rows = sum(each[0] for each in alike), sum(each[1] for each in alike)
    name = "what is timed answers alike"
    if not rows:
        return Check(name=name, outcome="not applicable", words="no model was timed in two float32 forms")
    share = same / rows
    return Check(
        name=name, outcome="passed" if share >= _CLASSES_ALIKE else "failed", value=share, limit=_CLASSES_ALIKE,
        words=f"{same:,} of {rows:,} answers have the class of the first float32 form of the same model",
    )  # fmt: skip


def _model_of(form: Form) -> tuple[str, int | None]:
    return form.model, form.kept


def _percentiles(by_step: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {step: percentiles(milliseconds) for step, milliseconds in by_step.items()}
