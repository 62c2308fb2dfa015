"""Two results of one kind held against each other: which figures became worse, beyond the limit and beyond the noise.

A figure is worse when it changed for the worse by more than the limit *and* its 95 % interval shows so: of times, the
intervals of both medians must lie apart; of shares, likewise. A change beyond the limit that the intervals do not bear
out is said to be within the noise, and fails nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rekd_deploy.bench.results import Result
from rekd_deploy.errors import BenchmarkError

Better = Literal["lower", "higher"]
Outcome = Literal["worse", "better", "same", "within the noise"]
_DECIDES_SPEED = ("processor", "machine", "cores", "gpus")
"""What of the hardware must be equal."""


@dataclass(frozen=True)
class Figure:
    """One number that can be compared."""

    value: float
    better: Better
    low: float | None = None
    """Of its 95 % interval; None: it has none."""
    high: float | None = None
    points: bool = False
    """A share from 0 to 1, compared in percentage points and not in relation to itself."""


@dataclass(frozen=True)
class Change:
    """One figure in both results."""

    name: str
    old: Figure
    new: Figure
    change: float
    """Of shares in percentage points, of others in percent; above 0: more."""
    outcome: Outcome

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
    """What else differs."""

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
    differing = [name for name in _DECIDES_SPEED if old.hardware.get(name) != new.hardware.get(name)]
    if differing and not other_hardware:
        shown = "; ".join(f"{name}: {old.hardware.get(name)} and {new.hardware.get(name)}" for name in differing)
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
    return Comparison(
        [change_of(name, before[name], after[name], percent, points) for name in shared], _broken(old, new),
        sorted(set(before) - set(after)), sorted(set(after) - set(before)), _notes(old, new),
    )  # fmt: skip


def change_of(name: str, old: Figure, new: Figure, percent: float, points: float) -> Change:
    """Judge one figure."""
    difference = new.value - old.value
    if old.points:
        change, limit = 100 * difference, points
    else:
        change, limit = (100 * difference / abs(old.value) if old.value else float("inf") * difference), percent
    worse = change > 0 if old.better == "lower" else change < 0
    outcome: Outcome = "same"
    if abs(change) > limit:
        outcome = ("worse" if worse else "better") if _apart(old, new) else "within the noise"
    return Change(name, old, new, change, outcome)


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
            yield f"{place}: {way['name']}, p50 ms", _time(way["milliseconds"])
        for ratio in cell["ratios"]:
            name = f"{place}: {ratio['way']} / {ratio['baseline']}"
            yield name, Figure(ratio["ratio"], "lower", ratio["low"], ratio["high"])


def _of_serving(result: Result) -> Iterator[tuple[str, Figure]]:
    figures = result.figures
    for load in figures["closed"]:
        if load["milliseconds"]:
            yield f"concurrency {load['concurrency']}: p50 ms", _time(load["milliseconds"])
        if throughput := load["throughput"]:
            name = f"concurrency {load['concurrency']}: throughput, served / in process"
            yield name, Figure(throughput["ratio"], "higher", throughput["low"], throughput["high"])
    for load in figures["open"]:
        if load["milliseconds"] and load["share_of_peak"]:
            yield f"open loop at {load['share_of_peak']:.0%} of the peak: p50 ms", _time(load["milliseconds"])
    for name, times in figures["in_process"]["milliseconds"].items():
        yield f"one at a time, {name}: p50 ms", _time(times)
    ratio = figures["in_process"]["ratio"]
    yield "served / in process", Figure(ratio["ratio"], "lower", ratio["low"], ratio["high"])


def _of_accuracy(result: Result) -> Iterator[tuple[str, Figure]]:
    classification, count = result.figures["classification"], result.settings["examples"]
    yield "accuracy", _share(classification["accuracy"], count)
    yield "macro_f1", _share(classification["macro_f1"], count)


def _of_faithfulness(result: Result) -> Iterator[tuple[str, Figure]]:
    yield "accuracy given the rationale", _share(result.figures["answers"]["accuracy"], result.settings["examples"])


def _share(value: float, count: int) -> Figure:
    """A share of ``count`` examples, with Wilson's interval (of an F1 about right)."""
    z = 1.96
    middle = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    return Figure(value, "higher", middle - half, middle + half, points=True)


def _time(milliseconds: dict[str, float]) -> Figure:
    return Figure(milliseconds["p50"], "lower", milliseconds["low"], milliseconds["high"])


def _apart(old: Figure, new: Figure) -> bool:
    """Whether the intervals do not touch; a figure without one is taken at its word."""
    old_low, old_high = _interval(old)
    new_low, new_high = _interval(new)
    return new_low > old_high or new_high < old_low


def _interval(figure: Figure) -> tuple[float, float]:
    low = figure.value if figure.low is None else figure.low
    return low, figure.value if figure.high is None else figure.high


def _broken(old: Result, new: Result) -> list[str]:
    passed = {check.name for check in old.checks if check.outcome == "passed"}
    return [f"the check '{check.name}'" for check in new.failed if check.name in passed]


def _notes(old: Result, new: Result) -> list[str]:
    """Differences that may explain a change."""
    found = [
        f"{name} {old.versions.get(name, 'missing')} -> {new.versions.get(name, 'missing')}"
        for name in sorted({*old.versions, *new.versions}) if old.versions.get(name) != new.versions.get(name)
    ]
    found += [
        f"setting {name}: {old.settings.get(name)} -> {new.settings.get(name)}"
        for name in sorted({*old.settings, *new.settings}) if old.settings.get(name) != new.settings.get(name)
    ]
    found += [f"{name}: {value} -> {new.hardware.get(name)}" for name, value in old.hardware.items()
              if name in _DECIDES_SPEED and value != new.hardware.get(name)]
    return found
