"""Two results of one kind compared: which figures became worse, beyond the limit and beyond the noise.

A figure is worse when it changed for the worse by more than the limit *and* its 95 % interval shows so: of times, the
intervals of both medians must lie apart; of shares, likewise. A change beyond the limit that the intervals do not bear
out is said to be within the noise, and fails nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rekd_deploy.bench.results import Result
from rekd_deploy.errors import BenchmarkError

Better = Literal["lower", "higher"]
_DECIDES_SPEED = ("processor", "machine", "cores", "gpus")
"""What of the hardware must be equal."""


@dataclass(frozen=True)
class Figure:
    """One number that can be compared; ``low`` and ``high`` of its 95 % interval, None: it has none."""

    value: float
    better: Better
    low: float | None = None
    high: float | None = None
    points: bool = False
    """A share from 0 to 1, compared in percentage points and not in relation to itself."""

    @property
    def interval(self) -> tuple[float, float]:
        """The value itself where there is none."""
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high


@dataclass(frozen=True)
class Change:
    """One figure in both results."""

    name: str
    old: Figure
    new: Figure
    change: float
    """Of shares in percentage points, of others in percent; above 0: more."""
    outcome: Literal["worse", "better", "same", "within the noise"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name, "old": self.old.value, "new": self.new.value, "change": self.change,
            "unit": "points" if self.old.points else "%", "outcome": self.outcome,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    changes: list[Change]
    broken: list[str]
    """Checks that passed and now fail."""
    only_old: list[str]
    only_new: list[str]
    notes: list[str]
    """What else differs, and may explain a change."""

    @property
    def worse(self) -> list[Change]:
        """The changes that fail."""
        return [change for change in self.changes if change.outcome == "worse"]

    @property
    def failed(self) -> list[str]:
        """Everything that became worse, by name."""
        return [*(change.name for change in self.worse), *self.broken]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": "compare", "worse": self.failed, "changes": [change.to_dict() for change in self.changes],
            "only_old": self.only_old, "only_new": self.only_new, "notes": self.notes,
        }  # fmt: skip


def compare(
    old: Result, new: Result, *, percent: float, points: float, other_hardware: bool = False
) -> Comparison:
    """Match the figures of two results by name.

    Args:
        percent: largest change for the worse of times and throughputs.
        points: largest change for the worse of shares, in percentage points.
        other_hardware: compare although the machines differ.

    Raises:
        BenchmarkError: the kinds, the data or the machines differ, or no figure is in both.
    """
    if old.kind != new.kind:
        raise BenchmarkError(f"the old result is of '{old.kind}', the new of '{new.kind}'; fix: two of one kind")
    machines = [{name: each.hardware.get(name) for name in _DECIDES_SPEED} for each in (old, new)]
    differing = _differing(*machines)
    if differing and not other_hardware:
        shown = "; ".join(f"{name}: {before} and {after}" for name, before, after in differing)
        raise BenchmarkError(
            f"the results are from different machines ({shown}); fix: --other-hardware, to compare all the same"
        )
    data = [each.inputs["data"] for each in (old, new) if "data" in each.inputs]
    if len(data) == 2 and data[0].sha256 != data[1].sha256:
        raise BenchmarkError(
            f"the results are of different data ({data[0].name}, {data[1].name}); fix: measure on the same"
        )
    before, after = dict(figures_of(old)), dict(figures_of(new))
    shared = [name for name in before if name in after]
    if not shared:
        raise BenchmarkError("the results have no figure in common; fix: measure the same grid or settings")
    passed = {check.name for check in old.checks if check.outcome == "passed"}
    versions = _differing(old.versions, new.versions, "missing")
    notes = [f"{name} {before} -> {after}" for name, before, after in versions]
    notes += [f"setting {name}: {before} -> {after}" for name, before, after in _differing(old.settings, new.settings)]
    return Comparison(
        [change_of(name, before[name], after[name], percent, points) for name in shared],
        [f"the check '{check.name}'" for check in new.failed if check.name in passed],
        sorted(set(before) - set(after)), sorted(set(after) - set(before)),
        [*notes, *(f"{name}: {before} -> {after}" for name, before, after in differing)],
    )  # fmt: skip


def change_of(name: str, old: Figure, new: Figure, percent: float, points: float) -> Change:
    """Judge one figure."""
    difference = new.value - old.value
    if old.points:
        change, limit = 100 * difference, points
    else:
        change, limit = (100 * difference / abs(old.value) if old.value else float("inf") * difference), percent
    worse = change > 0 if old.better == "lower" else change < 0
    if abs(change) <= limit:
        return Change(name, old, new, change, "same")
    (old_low, old_high), (new_low, new_high) = old.interval, new.interval
    apart = new_low > old_high or new_high < old_low  # a figure without an interval is taken at its word
    return Change(name, old, new, change, ("worse" if worse else "better") if apart else "within the noise")


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], missing: Any = None) -> list[tuple[str, Any, Any]]:
    """Name, old and new value."""
    found = ((name, old.get(name, missing), new.get(name, missing)) for name in sorted({*old, *new}))
    return [each for each in found if each[1] != each[2]]


def figures_of(result: Result) -> Iterator[tuple[str, Figure]]:
    """The comparable figures of a result by name.

    Raises:
        BenchmarkError: nothing of this kind can be compared.
    """
    readers = {
        "latency": _of_latency, "serving": _of_serving, "accuracy": _of_accuracy, "faithfulness": _of_faithfulness
    }
    if result.kind not in readers:
        raise BenchmarkError(f"results of '{result.kind}' cannot be compared; kinds: {', '.join(readers)}")
    try:
        yield from readers[result.kind](result)
    except (KeyError, TypeError) as error:
        raise BenchmarkError(f"the result of '{result.kind}' lacks figures ({error!r}); fix: measure again") from None


def _of_latency(result: Result) -> Iterator[tuple[str, Figure]]:
    for cell in result.figures["cells"]:
        place = f"batch {cell['batch']}, length {cell['length']}"
        for way in cell["ways"]:
            yield f"{place}: {way['name']}, p50 ms", _median(way["milliseconds"])
        for ratio in cell["ratios"]:
            yield f"{place}: {ratio['way']} / {ratio['baseline']}", _median(ratio, "ratio")


def _of_serving(result: Result) -> Iterator[tuple[str, Figure]]:
    figures = result.figures
    for load in figures["closed"]:
        if load["milliseconds"]:
            yield f"concurrency {load['concurrency']}: p50 ms", _median(load["milliseconds"])
        if throughput := load["throughput"]:
            name = f"concurrency {load['concurrency']}: throughput, served / in process"
            yield name, _median(throughput, "ratio", "higher")
    for load in figures["open"]:
        if load["milliseconds"] and load["share_of_peak"]:
            yield f"open loop at {load['share_of_peak']:.0%} of the peak: p50 ms", _median(load["milliseconds"])
    for name, times in figures["in_process"]["milliseconds"].items():
        yield f"one at a time, {name}: p50 ms", _median(times)
    yield "served / in process", _median(figures["in_process"]["ratio"], "ratio")


def _of_accuracy(result: Result) -> Iterator[tuple[str, Figure]]:
    for name in ("accuracy", "macro_f1"):
        yield name, _share(result.figures["classification"][name], result.settings["examples"])


def _of_faithfulness(result: Result) -> Iterator[tuple[str, Figure]]:
    yield "accuracy given the rationale", _share(result.figures["answers"]["accuracy"], result.settings["examples"])


def _share(value: float, count: int) -> Figure:
    """A share of ``count`` examples, with Wilson's interval (of an F1 about right)."""
    z = 1.96
    middle = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    return Figure(value, "higher", middle - half, middle + half, points=True)


def _median(figures: Mapping[str, float], name: str = "p50", better: Better = "lower") -> Figure:
    return Figure(figures[name], better, figures["low"], figures["high"])
