"""The report's sections about predictions, rationales and times; each maker adds to its section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rekd_deploy.bench.report.parts import Chart, Section, Table, line_chart, stacked_bars
from rekd_deploy.bench.variants import COMPACTED, ONNX_CPU, PYTORCH, ZEROED
from rekd_deploy.repository.config import ENSEMBLE

_LINES = 7
"""Most lines of a chart."""
_PERCENTILES = ("p50", "p95", "p99")


def latency(section: Section, figures: dict[str, Any]) -> None:
    """Charts over batch and length, the split of a prediction, ratios and times."""
    cells = figures["cells"]
    lengths, batches = (sorted({cell[axis] for cell in cells}) for axis in ("length", "batch"))
    longest, middle = lengths[-1], batches[len(batches) // 2]
    section.lead.extend(_findings(cells))
    if len(batches) > 1:
        at_longest = [cell for cell in cells if cell["length"] == longest]
        section.charts.append(_growth(section, at_longest, "batch", f"Time of a batch of {longest} tokens or patches."))
    if len(lengths) > 1:
        at_middle = [cell for cell in cells if cell["batch"] == middle]
        section.charts.append(_growth(section, at_middle, "length", f"Growth with the length, batch {middle}."))
    for batch in sorted({batches[0], middle}):
        cell = next(cell for cell in cells if cell["batch"] == batch and cell["length"] == longest)
        if bars := _split(cell):
            title = f"where the time goes, batch {batch}, length {longest}"
            svg = stacked_bars(bars, name=f"{section.anchor}-split-{batch}", title=title, x="milliseconds")
            section.charts.append(Chart(f"Where the time of an answer goes: batch {batch}, length {longest}.", svg))
    columns = ("form", "batch", "length", "p50 ms", "p90", "p95", "p99", "a second")
    section.tables += [ratio_table(cells, "Ratios of times, from rounds"), Table("Times", columns, [
        (way["name"], str(cell["batch"]), str(cell["length"]),
         *(f"{way['milliseconds'][key]:.2f}" for key in ("p50", "p90", "p95", "p99")),
         f"{way['items_per_second']:,.0f}")
        for cell in cells for way in cell["ways"]
    ], folded=True)]  # fmt: skip
    if figures["not_run"]:
        rows = [(each["name"], each["reason"]) for each in figures["not_run"]]
        section.tables.append(Table("Not run here", ("form", "why"), rows))


def ratio_table(cells: Sequence[dict[str, Any]], title: str) -> Table:
    """The ratios of all cells, folded."""
    columns = ("form", "in units of", "batch", "length", "ratio", "95 % interval")
    return Table(title, columns, [
        (each["way"], each["baseline"], str(cell["batch"]), str(cell["length"]), f"{each['ratio']:.2f}",
         f"{each['low']:.2f} to {each['high']:.2f}")
        for cell in cells for each in cell["ratios"]
    ], folded=True)  # fmt: skip


def _growth(section: Section, cells: list[dict[str, Any]], axis: str, caption: str) -> Chart:
    cells = sorted(cells, key=lambda cell: cell[axis])
    series: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in _chosen(cells)}
    for cell in cells:
        for way in cell["ways"]:
            if way["name"] in series:
                series[way["name"]][0].append(cell[axis])
                series[way["name"]][1].append(way["milliseconds"]["p50"])
    svg = line_chart(
        series, name=f"{section.anchor}-{axis}", title=f"median latency against {axis}", x=axis, y="milliseconds",
        logarithmic=True, whole_x=True,
    )  # fmt: skip
    return Chart(caption, svg)


def _chosen(cells: list[dict[str, Any]]) -> list[str]:
    """The variants of a chart: ONNX Runtime's before PyTorch's, one K, the plain ones first."""
    ways = [way for cell in cells for way in cell["ways"]]
    first_kept = next((way["kept"] for way in ways if way["kept"]), None)
    wanted = [way for way in ways if way["kept"] in (None, first_kept)]
    wanted.sort(key=lambda way: (way["runtime"] == PYTORCH, way["runtime"] == "torch.compile"))
    return list(dict.fromkeys(way["name"] for way in wanted))[:_LINES]


def _split(cell: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians of the steps of each variant that knows them, with what surrounds the graphs."""
    around, chosen = {name: times["p50"] for name, times in cell["around"].items()}, _chosen([cell])
    return {
        way["name"]: {"preprocess": around["preprocess"],
                      **{step: times["p50"] for step, times in way["steps"].items()}, "decode": around["decode"]}
        for way in cell["ways"] if way["name"] in chosen and way["steps"]
    }  # fmt: skip


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


def serving(section: Section, figures: dict[str, Any]) -> None:
    """Load curves, the server's split, and what serving adds."""
    closed, opened = ([load for load in figures[loop] if load["milliseconds"]] for loop in ("closed", "open"))
    if closed:
        peak = max(closed, key=lambda load: load["per_second"])
        section.tiles += [("highest throughput", f"{peak['per_second']:,.0f} a second"),
                          ("one at a time, p50", f"{closed[0]['milliseconds']['p50']:.1f} ms")]  # fmt: skip
    for name, loads, axis, title, x, caption in (
        ("closed", closed, "concurrency", "latency against clients", "clients at once",
         "Latency under a closed loop: each client waits for its response."),
        ("open", opened, "rate", "latency against arrivals", "arrivals a second",
         "Latency under Poisson arrivals, counted from when a request was to be sent."),
    ):  # fmt: skip
        if len(loads) > 1:
            places, several = [load[axis] for load in loads], name == "closed"
            svg = line_chart(
                {key: (places, [load["milliseconds"][key] for load in loads]) for key in _PERCENTILES},
                name=f"{section.anchor}-{name}", title=title, x=x, y="milliseconds", logarithmic=several,
                whole_x=several,
            )  # fmt: skip
            section.charts.append(Chart(caption, svg))
    bars = {
        f"{model.removeprefix('rekd_')}, {_clients(load['concurrency'])}":
            {part: step[f"{part}_ms"] for part in ("queue", "input", "compute", "output")}
        for load in ([closed[0], closed[-1]] if len(closed) > 1 else closed)
        for model, step in load["steps"].items() if step["compute_ms"] and model != ENSEMBLE
    }  # fmt: skip
    if bars:
        title = "time inside the server by step"
        svg = stacked_bars(bars, name=f"{section.anchor}-steps", title=title, x="milliseconds")
        section.charts.append(Chart("Inside the server, by step and clients at once: means of a request.", svg))
    ratio, times = figures["in_process"]["ratio"], figures["in_process"]["milliseconds"]
    section.lead.append(
        f"One question at a time takes {times['served']['p50']:.1f} ms through the server and "
        f"{times['in process']['p50']:.1f} ms in process: {ratio['ratio']:.2f} times as long "
        f"({ratio['low']:.2f} to {ratio['high']:.2f}), {figures['in_process']['added_ms']['p50']:.2f} ms more."
    )
    section.lead += [
        f"{_clients(load['concurrency'])}: {load['per_second']:.1f} requests a second through the server, "
        f"{load['in_process']['per_second']:.1f} in process with as many threads."
        for load in closed[-1:] if load["in_process"]
    ]  # fmt: skip
    section.tables.append(_loads(figures))


def _clients(count: float) -> str:
    return "1 client" if count == 1 else f"{count:.0f} clients"


def _loads(figures: dict[str, Any]) -> Table:
    named = []
    for load in figures["closed"]:
        named.append((f"closed, {_clients(load['concurrency'])}", load))
        if load["in_process"]:
            named.append((f"in process, {_clients(load['concurrency'])}", load["in_process"]))
    named += [(f"open, {load['rate']:.1f} a second", load) for load in figures["open"]]
    named += [(f"perf_analyzer, {_clients(found['concurrency'])}", {**found, "milliseconds": found, "failed": "–"})
              for found in figures["perf_analyzer"]]  # fmt: skip
    rows = [
        (name, *(f"{load['milliseconds'][key]:.1f}" if key in (load["milliseconds"] or {}) else "–"
                 for key in _PERCENTILES), f"{load['per_second']:.1f}", str(load["failed"]))
        for name, load in named
    ]  # fmt: skip
    if figures["perf_analyzer_not_run"]:
        rows.append((f"perf_analyzer: {figures['perf_analyzer_not_run']}", "–", "–", "–", "–", "–"))
    return Table("Loads", ("load", "p50 ms", "p95", "p99", "answers a second", "failed"), rows)


def accuracy(section: Section, figures: dict[str, Any]) -> None:
    """Tiles, the curve over rates, the reliability diagram, classes."""
    classification, calibration = figures["classification"], figures["calibration"]
    rate = figures["rate"].get("rate")
    section.tiles += [("accuracy", _percent(classification["accuracy"])), ("kept", _percent(rate)),
                      ("macro F1", _percent(classification["macro_f1"])),
                      ("calibration error", _percent(calibration["ece"]))]  # fmt: skip
    kept = f", reading {rate:.1%} of the input" if rate is not None else ""
    section.lead.append(f"{section.subject} answers {classification['accuracy']:.1%} of the examples correctly{kept}.")
    if reference := figures.get("reference"):
        section.tiles.append(("against the checkpoint", f"{reference['gap_points']:+.2f} points"))
    curves = {name: curve for name, curve in figures.get("curve", {}).items() if curve["rates"]}
    if curves:
        svg = line_chart(
            {name: (curve["rates"], curve["accuracies"]) for name, curve in curves.items()},
            name=f"{section.anchor}-curve", title="accuracy against the rate", x="share kept", y="accuracy",
            percent=True,
        )  # fmt: skip
        notes = "; ".join(f"{name}: {curve['note']}" for name, curve in curves.items() if "note" in curve)
        section.charts.append(Chart(f"Accuracy when the best-scored share of the input is kept. {notes}", svg))
        points = [dict(zip(curve["rates"], curve["accuracies"], strict=True)) for curve in curves.values()]
        rates = sorted(set().union(*points))
        rows = [(f"{rate:.0%}", *(_percent(each.get(rate)) for each in points)) for rate in rates]
        rows.append(("area", *(_number(curve.get("area")) for curve in curves.values())))
        section.tables.append(Table("Accuracy by share kept", ("kept", *curves), rows, folded=True))
    if bins := calibration.get("reliability"):
        svg = line_chart(
            {"served": ([each["confidence"] for each in bins], [each["accuracy"] for each in bins])},
            name=f"{section.anchor}-reliability", title="accuracy against confidence", x="confidence", y="accuracy",
            diagonal=True, percent=True,
        )  # fmt: skip
        section.charts.append(Chart("Reliability: on the dashed line, 80 % sure means 80 % right.", svg))
        rows = [(f"{each['low']:.0%} to {each['high']:.0%}", f"{each['examples']:,}", _percent(each["confidence"]),
                 _percent(each["accuracy"])) for each in bins]  # fmt: skip
        section.tables.append(Table("Reliability", ("confidence", "examples", "mean", "right"), rows, folded=True))
    rows = [
        (name, *(_number(each.get(key)) for key in ("precision", "recall", "f1")), f"{each.get('support', 0):,.0f}")
        for name, each in classification["per_class"].items()
    ]
    section.tables.append(Table("Classes", ("class", "precision", "recall", "F1", "examples"), rows))


def faithfulness(section: Section, figures: dict[str, Any]) -> None:
    """A table for each group of tests; the checks say what they mean."""
    answers = figures.get("answers", {})
    for name, key in (("accuracy given the rationale", "accuracy"), ("kept", "rate")):
        if key in answers:
            section.tiles.append((name, _percent(answers[key])))
    passed = sum(check.outcome == "passed" for check in section.checks)
    made = sum(check.outcome != "not applicable" for check in section.checks)
    section.lead.append(
        f"{passed} of {made} tests bear out that the rationale of {section.subject} is the reason of its answers."
    )
    plain(section, {name: value for name, value in figures.items() if name != "answers"})


def plain(section: Section, figures: Mapping[str, Any]) -> None:
    """A folded table for each group of figures."""
    for name, value in figures.items():
        rows = _flat(value if isinstance(value, Mapping) else {"": value})
        if rows and value is not None:
            section.tables.append(Table(name.replace("_", " "), ("figure", "value"), rows, folded=len(rows) > 6))


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Numbers and words by nested name; an interval is one entry; lists are left to the result file."""
    rows: list[tuple[str, str]] = []
    for name, value in figures.items():
        whole = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):
            rows.append((whole, f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]"))
        elif isinstance(value, Mapping):
            rows += _flat(value, f"{whole}: ")
        elif isinstance(value, bool):
            rows.append((whole, "yes" if value else "no"))
        elif not isinstance(value, (list, tuple)):
            rows.append((whole, _number(value) if value is None or isinstance(value, float) else str(value)))
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
