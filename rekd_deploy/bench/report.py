"""What is made of result files: one page for a browser, the same in Markdown, and a comparison of two.

The page is one file: charts are SVG within it, the style is its own, there is no script. It follows the reader's
dark or light, and reads on a phone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rekd_deploy.bench.results import Result
from rekd_deploy.bench.sections import KINDS, Chart, section_of, subject_of
from rekd_deploy.errors import BenchmarkError
from rekd_train.files import write_text

_DECIDES_SPEED = ("processor", "machine", "cores", "gpus")
"""What of the hardware must be equal."""


def write_report(title: str, results: Sequence[Result], page: Path, notes: Sequence[str] = ()) -> tuple[Path, Path]:
    """Write the page, and the summary beside it as .md; ``notes`` are paragraphs under the title.

    Raises:
        BenchmarkError: there is nothing to report, or a result lacks figures of its kind.
    """
    if not results:
        raise BenchmarkError("there is nothing to report; give result files of rekd-bench")
    markdown = Path(page).with_suffix(".md")
    texts = {path: _rendered(kind, title, results, notes) for path, kind in ((Path(page), "html"), (markdown, "md"))}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return Path(page), markdown


def _rendered(kind: str, title: str, results: Sequence[Result], notes: Sequence[str]) -> str:
    """The page, in which everything that comes from results is escaped; in Markdown charts are left out."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rekd_deploy.bench"), autoescape=kind == "html", undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    environment.filters["drawn"] = drawn
    order = list(KINDS)
    ranked = sorted(results, key=lambda each: order.index(each.kind) if each.kind in order else len(order))
    sections = [section_of(result, f"{result.kind}-{number}") for number, result in enumerate(ranked, 1)]
    rank = ("failed", "passed", "not applicable")
    checks = sorted(
        ((subject_of(result), check) for result in results for check in result.checks),
        key=lambda each: rank.index(each[1].outcome),
    )
    counts = Counter(check.outcome for _, check in checks)
    return environment.get_template(f"report.{kind}.j2").render(
        title=title, notes=notes, headline=headline(counts), checks=checks, sections=sections, results=results
    )


def headline(counts: Mapping[str, int]) -> str:
    """What passed, by the number of checks of each outcome."""
    failed, passed, others = (counts.get(outcome, 0) for outcome in ("failed", "passed", "not applicable"))
    if failed:
        text = f"{failed} of {failed + passed} checks failed"
    elif passed:
        text = f"All {passed} checks passed" if passed > 1 else "The one check passed"
    else:
        text = "No check applied"
    return f"{text}, {others} did not apply" if others else text


def drawn(chart: Chart) -> dict[str, Any]:
    """A chart in a frame of 1 by 1, y downwards: ticks ``x`` and ``y`` as (place, text), ``lines`` of points."""
    scale, ticks = (np.log, np.geomspace) if chart.logarithmic else (np.asarray, np.linspace)
    axes = [[value for line in chart.series.values() for value in line[axis]] for axis in (0, 1)]
    if chart.diagonal:
        axes = [[0.0, 1.0], [0.0, 1.0]]
    ends = [(min(values), max(values)) for values in axes]

    def places(values: Any, axis: int) -> list[float]:
        low, high = scale(ends[axis])
        share = (scale(values) - low) / ((high - low) or 1.0)
        return (1 - share if axis else share).round(4).tolist()

    found: dict[str, Any] = {"lines": [
        list(zip(places(xs, 0), places(ys, 1), strict=True)) for xs, ys in chart.series.values()
    ]}  # fmt: skip
    for axis, name in enumerate("xy"):
        at = sorted({*axes[0]}) if chart.logarithmic and axis == 0 else ticks(*ends[axis], 6)
        texts = [f"{value:.0%}" if chart.percent else f"{value:.3g}" for value in at]
        found[name] = list(zip(places(at, axis), texts, strict=True))
    return found


# two results of one kind: which figures became worse, beyond the limit and beyond the noise


class Figure(NamedTuple):
    """One number with its 95 % interval; ``points``: a share from 0 to 1, compared in percentage points."""

    value: float
    low: float
    high: float
    better: Literal["lower", "higher"] = "lower"
    points: bool = False


class Change(NamedTuple):
    """One figure in both results."""

    name: str
    old: float
    new: float
    change: float
    """In ``unit``; above 0: more."""
    unit: Literal["points", "%"]
    outcome: Literal["worse", "better", "same", "within the noise"]


class Comparison(NamedTuple):
    """What came of it: what fails by name, all changes, figures of one result alone, and what else differs."""

    worse: list[str]
    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    notes: list[str]


def compare(old: Result, new: Result, percent: float, points: float, other_hardware: bool = False) -> Comparison:
    """Match the figures of two results by name.

    Args:
        percent: largest change for the worse of times and throughputs; ``points``: of shares, in percentage points.
        other_hardware: compare although the machines differ.

    Raises:
        BenchmarkError: the kinds, the data or the machines differ, or no figure is in both.
    """
    if old.kind != new.kind:
        raise BenchmarkError(f"the old result is of '{old.kind}', the new of '{new.kind}'; fix: two of one kind")
    differing = _differing(*({name: each.hardware.get(name) for name in _DECIDES_SPEED} for each in (old, new)))
    if differing and not other_hardware:
        said = "; ".join(differing)
        raise BenchmarkError(f"the results are from different machines ({said}); fix: --other-hardware, if you must")
    data = [each.inputs["data"] for each in (old, new) if "data" in each.inputs]
    if len(data) == 2 and data[0].sha256 != data[1].sha256:
        raise BenchmarkError(
            f"the results are of different data ({data[0].name}, {data[1].name}); fix: measure on the same"
        )
    before, after = dict(_figures_of(old)), dict(_figures_of(new))
    changes = [change_of(name, before[name], after[name], percent, points) for name in before if name in after]
    if not changes:
        raise BenchmarkError("the results have no figure in common; fix: measure the same grid or settings")
    passed = {check.name for check in old.checks if check.outcome == "passed"}
    worse = [change.name for change in changes if change.outcome == "worse"]
    worse += [f"the check '{check.name}'" for check in new.failed if check.name in passed]
    notes = [*_differing(old.versions, new.versions), *_differing(old.settings, new.settings), *differing]
    return Comparison(worse, changes, sorted({*before} - {*after}), sorted({*after} - {*before}), notes)


def change_of(name: str, old: Figure, new: Figure, percent: float, points: float) -> Change:
    """Judge one figure: beyond the limit, and intervals that lie apart."""
    change = 100 * (new.value - old.value) / (1 if old.points else abs(old.value) or math.nan)
    apart = new.low > old.high or new.high < old.low
    if abs(change) <= (points if old.points else percent):
        outcome = "same"
    elif not apart:
        outcome = "within the noise"
    else:
        outcome = "worse" if (change > 0) == (old.better == "lower") else "better"
    return Change(name, old.value, new.value, change, "points" if old.points else "%", outcome)


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in sorted({*old, *new})
            if old.get(name) != new.get(name)]  # fmt: skip


def _figures_of(result: Result) -> Iterator[tuple[str, Figure]]:
    readers = {"latency": _of_latency, "serving": _of_serving, "accuracy": _shares, "faithfulness": _shares}
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


def _shares(result: Result) -> Iterator[tuple[str, Figure]]:
    """With Wilson's interval (of an F1 about right)."""
    from scipy.stats import binomtest

    figures, count = result.figures, result.settings["examples"]
    if result.kind == "accuracy":
        found = {name: figures["classification"][name] for name in ("accuracy", "macro_f1")}
    else:
        found = {"accuracy given the rationale": figures["answers"]["accuracy"]}
    for name, value in found.items():
        low, high = binomtest(round(value * count), count).proportion_ci(method="wilson")
        yield name, Figure(value, low, high, "higher", points=True)


def _median(figures: Mapping[str, float], name: str = "p50", better: Literal["lower", "higher"] = "lower") -> Figure:
    return Figure(figures[name], figures["low"], figures["high"], better)
