"""The sections of results: tables, charts, tiles and sentences, for the report and the terminal. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rekd_deploy.bench.results import Result
from rekd_deploy.bench.variants import COMPACTED, COMPILED, ONNX_CPU, PYTORCH, ZEROED
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.repository.config import ENSEMBLE

_LINES = 7
"""Most lines of a chart."""
_PERCENTILES = ("p50", "p95", "p99")


class Table(NamedTuple):
    """Columns after the first are set to the right; ``detail``: left out of the terminal."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    detail: bool = False

    @property
    def folded(self) -> bool:
        """Whether the page shows it only when asked for."""
        return self.detail or len(self.rows) > 12


class Chart(NamedTuple):
    """Lines with markers: x and y values by what the legend says."""

    caption: str
    series: dict[str, tuple[Sequence[float], Sequence[float]]]
    x: str
    y: str
    logarithmic: bool = False
    """Both axes, ticks at the x values alone."""
    percent: bool = False
    """Both axes are shares."""
    diagonal: bool = False
    """A dashed line where y equals x."""


@dataclass
class Section:
    """One result: what comes out of it in sentences (``lead``), figures that stand out (``tiles``), charts, tables."""

    anchor: str
    title: str
    subject: str
    lead: list[str] = field(default_factory=list)
    tiles: list[tuple[str, str]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def section_of(result: Result, anchor: str = "") -> Section:
    """The section of a result; a kind that is not known is made of plain tables.

    Raises:
        BenchmarkError: the result lacks figures of its kind.
    """
    title, make = KINDS.get(result.kind, (result.kind, lambda section, result: _plain(section, result.figures)))
    section = Section(anchor, title, subject_of(result))
    try:
        make(section, result)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BenchmarkError(f"the result of '{result.kind}' lacks figures ({error!r}); fix: measure again") from None
    return section


def subject_of(result: Result) -> str:
    """What a result is about, for a heading."""
    roles = [role for role in result.inputs if role.startswith(("repository", "server"))] or list(result.inputs)
    names = list(dict.fromkeys(result.inputs[role].name for role in roles)) or [result.kind]
    precision = result.settings.get("precision")
    return ", ".join(names) + (f" ({precision})" if precision and precision not in names else "")


def _latency(section: Section, result: Result) -> None:
    cells = result.figures["cells"]
    lengths, batches = (sorted({cell[axis] for cell in cells}) for axis in ("length", "batch"))
    longest, middle = lengths[-1], batches[len(batches) // 2]
    section.lead += _findings(cells)
    for axis, held, value, caption in (
        ("batch", "length", longest, f"Time of a batch of {longest} tokens or patches."),
        ("length", "batch", middle, f"Growth with the length, batch {middle}."),
    ):  # fmt: skip
        shown = sorted((cell for cell in cells if cell[held] == value), key=lambda cell: cell[axis])
        if len(shown) > 1:
            section.charts.append(Chart(caption, _growth(shown, axis), axis, "milliseconds", logarithmic=True))
    columns = ("variant", "batch", "length", "p50 ms", "p90", "p95", "p99", "a second")
    section.tables += [Table("Times", columns, [
        (way["name"], str(cell["batch"]), str(cell["length"]),
         *(f"{way['milliseconds'][key]:.2f}" for key in ("p50", "p90", "p95", "p99")),
         f"{way['items_per_second']:,.0f}")
        for cell in cells for way in cell["ways"]
    ]), ratio_table(cells, "Ratios of times, from rounds")]  # fmt: skip
    if result.figures["not_run"]:
        rows = [(each["name"], each["reason"]) for each in result.figures["not_run"]]
        section.tables.append(Table("Not run here", ("variant", "why"), rows))


def ratio_table(cells: Sequence[dict[str, Any]], title: str) -> Table:
    """The ratios of all cells."""
    columns = ("variant", "in units of", "batch", "length", "ratio", "95 % interval")
    return Table(title, columns, [
        (each["way"], each["baseline"], str(cell["batch"]), str(cell["length"]), f"{each['ratio']:.2f}",
         f"{each['low']:.2f} to {each['high']:.2f}")
        for cell in cells for each in cell["ratios"]
    ], detail=True)  # fmt: skip


def _growth(cells: list[dict[str, Any]], axis: str) -> dict[str, tuple[list[float], list[float]]]:
    """Medians by variant, ONNX Runtime's before PyTorch's."""
    ways = sorted(cells[0]["ways"], key=lambda way: way["runtime"] in (PYTORCH, COMPILED))
    series: dict[str, tuple[list[float], list[float]]] = {way["name"]: ([], []) for way in ways[:_LINES]}
    for cell in cells:
        for way in (way for way in cell["ways"] if way["name"] in series):
            series[way["name"]][0].append(cell[axis])
            series[way["name"]][1].append(way["milliseconds"]["p50"])
    return series


def _findings(cells: list[dict[str, Any]]) -> list[str]:
    """What compaction is worth, and what the rationale costs, where the grid is largest."""
    cell = max(cells, key=lambda cell: (cell["length"], cell["batch"]))
    models, found = {way["name"]: way for way in cell["ways"]}, []
    for each in cell["ratios"]:
        way, baseline = models[each["way"]], models[each["baseline"]]
        own = way["model"] == COMPACTED and way["runtime"] == baseline["runtime"] and way["graphs"] == 2
        if not own or way["precision"] != baseline["precision"] or way["runtime"] == PYTORCH:
            continue
        what = "blanking words" if baseline["model"] == ZEROED else f"a plain {baseline['model']}"
        where = "" if way["runtime"] == ONNX_CPU else f" on {way['runtime']}"
        found.append(
            f"Reading only the rationale takes {each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f}) of the "
            f"time of {what} at batch {cell['batch']}, length {cell['length']}{where}, {way['precision']}, K "
            f"{way['kept']}."
        )
    return found[:4]


def _serving(section: Section, result: Result) -> None:
    figures = result.figures
    closed, opened = ([load for load in figures[loop] if load["milliseconds"]] for loop in ("closed", "open"))
    if closed:
        peak = max(closed, key=lambda load: load["per_second"])
        section.tiles += [("highest throughput", f"{peak['per_second']:,.0f} a second"),
                          ("one at a time, p50", f"{closed[0]['milliseconds']['p50']:.1f} ms")]  # fmt: skip
    for loads, axis, x, caption in (
        (closed, "concurrency", "clients at once", "Latency under a closed loop: each client waits for its response."),
        (opened, "rate", "arrivals a second",
         "Latency under Poisson arrivals, counted from when a request was to be sent."),
    ):  # fmt: skip
        if len(loads) > 1:
            values = [load[axis] for load in loads]
            series = {key: (values, [load["milliseconds"][key] for load in loads]) for key in _PERCENTILES}
            section.charts.append(Chart(caption, series, x, "milliseconds", logarithmic=axis == "concurrency"))
    ratio, times = figures["in_process"]["ratio"], figures["in_process"]["milliseconds"]
    section.lead.append(
        f"One request at a time takes {times['served']['p50']:.1f} ms through the server and "
        f"{times['in process']['p50']:.1f} ms in process: {ratio['ratio']:.2f} times as long "
        f"({ratio['low']:.2f} to {ratio['high']:.2f}), {figures['in_process']['added_ms']['p50']:.2f} ms more."
    )
    section.lead += [
        f"{_clients(load)}: {load['per_second']:.1f} requests a second through the server, "
        f"{load['in_process']['per_second']:.1f} in process with as many threads."
        for load in closed[-1:] if load["in_process"]
    ]  # fmt: skip
    named = [(f"closed, {_clients(load)}", load) for load in figures["closed"]]
    named += [(f"in process, {_clients(load)}", load["in_process"]) for load in figures["closed"] if load["in_process"]]
    named += [(f"open, {load['rate']:.1f} a second", load) for load in figures["open"]]
    columns = ("load", "p50 ms", "p95", "p99", "responses a second", "failed")
    section.tables.append(Table("Loads", columns, [
        (name, *(f"{load['milliseconds'][key]:.1f}" if load["milliseconds"] else "–" for key in _PERCENTILES),
         f"{load['per_second']:.1f}", str(load["failed"]))
        for name, load in named
    ]))  # fmt: skip
    parts = ("queue", "input", "compute", "output")
    section.tables.append(Table("Inside the server, mean milliseconds of a request", ("step", *parts), [
        (f"{model.removeprefix('rekd_')}, {_clients(load)}", *(f"{step[f'{part}_ms']:.2f}" for part in parts))
        for load in closed for model, step in load["steps"].items() if step["compute_ms"] and model != ENSEMBLE
    ]))  # fmt: skip


def _clients(load: Mapping[str, Any]) -> str:
    return "1 client" if load["concurrency"] == 1 else f"{load['concurrency']:.0f} clients"


def _accuracy(section: Section, result: Result) -> None:
    figures = result.figures
    classification, calibration = figures["classification"], figures["calibration"]
    rate = figures["rate"].get("rate")
    section.tiles += [("accuracy", _percent(classification["accuracy"])), ("kept", _percent(rate)),
                      ("macro F1", _percent(classification["macro_f1"])),
                      ("calibration error", _percent(calibration["ece"]))]  # fmt: skip
    kept = f", reading {rate:.1%} of the input" if rate is not None else ""
    section.lead.append(f"{section.subject} predicts {classification['accuracy']:.1%} of the examples correctly{kept}.")
    if reference := figures.get("reference"):
        section.tiles.append(("against the checkpoint", f"{reference['gap_points']:+.2f} points"))
    curves = {name: curve for name, curve in figures.get("curve", {}).items() if curve["rates"]}
    if curves:
        notes = "; ".join(f"{name}: {curve['note']}" for name, curve in curves.items() if "note" in curve)
        caption = f"Accuracy when the best-scored share of the input is kept. {notes}"
        series = {name: (curve["rates"], curve["accuracies"]) for name, curve in curves.items()}
        section.charts.append(Chart(caption, series, "share kept", "accuracy", percent=True))
        points = [dict(zip(curve["rates"], curve["accuracies"], strict=True)) for curve in curves.values()]
        rates = sorted(set().union(*points))
        rows = [(f"{rate:.0%}", *(_percent(each.get(rate)) for each in points)) for rate in rates]
        rows.append(("area", *(_number(curve.get("area")) for curve in curves.values())))
        section.tables.append(Table("Accuracy by share kept", ("kept", *curves), rows))
    if bins := calibration.get("reliability"):
        series = {"served": ([each["confidence"] for each in bins], [each["accuracy"] for each in bins])}
        caption = "Reliability: on the dashed line, 80 % sure means 80 % right."
        section.charts.append(Chart(caption, series, "confidence", "accuracy", percent=True, diagonal=True))
    rows = [
        (name, *(_number(each.get(key)) for key in ("precision", "recall", "f1")), f"{each.get('support', 0):,.0f}")
        for name, each in classification["per_class"].items()
    ]
    section.tables.append(Table("Classes", ("class", "precision", "recall", "F1", "examples"), rows))


def _faithfulness(section: Section, result: Result) -> None:
    for name, key in (("accuracy given the rationale", "accuracy"), ("kept", "rate")):
        section.tiles.append((name, _percent(result.figures["answers"][key])))
    passed = sum(check.outcome == "passed" for check in result.checks)
    made = sum(check.outcome != "not applicable" for check in result.checks)
    section.lead.append(
        f"{passed} of {made} tests bear out that the rationale of {section.subject} is the reason of its predictions."
    )
    _plain(section, {name: value for name, value in result.figures.items() if name != "answers"})


def _plain(section: Section, figures: Mapping[str, Any]) -> None:
    """Tables as they are, under 'tables'; else one for each group of figures."""
    section.tables += [Table(**each) for each in figures.get("tables", ())]
    for name, value in figures.items():
        rows = _flat(value if isinstance(value, Mapping) else {"": value})
        if rows and value is not None:
            section.tables.append(Table(name.replace("_", " "), ("figure", "value"), rows))


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Numbers and words by nested name; an interval is one entry; lists are left to the result file."""
    rows: list[tuple[str, str]] = []
    for name, value in figures.items():
        whole = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):
            rows.append((whole, f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]"))
        elif isinstance(value, Mapping):
            rows += _flat(value, f"{whole}: ")
        elif not isinstance(value, (list, tuple)):
            rows.append((whole, _number(value) if value is None or isinstance(value, float) else str(value)))
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


KINDS: dict[str, tuple[str, Callable[[Section, Result], None]]] = {
    "accuracy": ("Is it right?", _accuracy),
    "faithfulness": ("Is the rationale the reason?", _faithfulness),
    "latency": ("What does a prediction cost?", _latency),
    "serving": ("What does it cost when served?", _serving),
}
"""Title and maker of a section by kind, in the order of the report."""
