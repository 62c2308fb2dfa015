"""The report's sections about predictions, rationales and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rekd_deploy.bench.report_parts import Chart, Section, Table, line_chart, stacked_bars
from rekd_deploy.bench.variants import COMPACTED, ONNX_CPU, PYTORCH, ZEROED
from rekd_deploy.repository.config import ENSEMBLE

_LINES = 7
"""Most lines of a chart."""


def latency(section: Section, figures: dict[str, Any]) -> None:
    """Charts over batch and length, the split of an answer, ratios and times; of a result of the kind 'latency'."""
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
    section.tables.append(ratio_table(cells, "Ratios of times, from turns"))
    times = [
        (way["name"], str(cell["batch"]), str(cell["length"]),
         *(f"{way['milliseconds'][key]:.2f}" for key in ("p50", "p90", "p95", "p99")),
         f"{way['items_per_second']:,.0f}")
        for cell in cells for way in cell["ways"]
    ]  # fmt: skip
    columns = ("form", "batch", "length", "p50 ms", "p90", "p95", "p99", "a second")
    section.tables.append(Table("Times", columns, times, folded=True))
    if figures["not_run"]:
        rows = [(each["name"], each["reason"]) for each in figures["not_run"]]
        section.tables.append(Table("Not run here", ("form", "why"), rows))


def ratio_table(cells: Sequence[dict[str, Any]], title: str) -> Table:
    """The ratios of all cells, folded."""
    ratios = [
        (each["way"], each["baseline"], str(cell["batch"]), str(cell["length"]), f"{each['ratio']:.2f}",
         f"{each['low']:.2f} to {each['high']:.2f}")
        for cell in cells for each in cell["ratios"]
    ]  # fmt: skip
    columns = ("form", "in units of", "batch", "length", "ratio", "95 % interval")
    return Table(title, columns, ratios, folded=True)


def serving(section: Section, figures: dict[str, Any]) -> None:
    """Load curves, the server's split, and what serving adds; of a result of the kind 'serving'."""
    closed = [load for load in figures["closed"] if load["milliseconds"]]
    if closed:
        peak = max(closed, key=lambda load: load["per_second"])
        section.tiles += [("highest throughput", f"{peak['per_second']:,.0f} a second"),
                          ("one at a time, p50", f"{closed[0]['milliseconds']['p50']:.1f} ms")]  # fmt: skip
    if len(closed) > 1:
        counts = [load["concurrency"] for load in closed]
        svg = line_chart(
            {key: (counts, [load["milliseconds"][key] for load in closed]) for key in ("p50", "p95", "p99")},
            name=f"{section.anchor}-closed", title="latency against askers", x="askers at once", y="milliseconds",
            logarithmic=True, whole_x=True,
        )  # fmt: skip
        section.charts.append(Chart("Latency under a closed loop: each asker waits for its answer.", svg))
    opened = [load for load in figures["open"] if load["milliseconds"]]
    if len(opened) > 1:
        rates = [load["rate"] for load in opened]
        svg = line_chart(
            {key: (rates, [load["milliseconds"][key] for load in opened]) for key in ("p50", "p95", "p99")},
            name=f"{section.anchor}-open", title="latency against arrivals", x="arrivals a second", y="milliseconds",
        )  # fmt: skip
        section.charts.append(Chart("Latency under Poisson arrivals, counted from when a request was to be sent.", svg))
    parts = ("queue", "input", "compute", "output")
    bars = {
        f"{model.removeprefix('rekd_')}, {askers(load['concurrency'])}": {part: step[f"{part}_ms"] for part in parts}
        for load in ([closed[0], closed[-1]] if len(closed) > 1 else closed)
        for model, step in load["steps"].items() if step["compute_ms"] and model != ENSEMBLE
    }  # fmt: skip
    if bars:
        title = "time inside the server by step"
        svg = stacked_bars(bars, name=f"{section.anchor}-steps", title=title, x="milliseconds")
        section.charts.append(Chart("Inside the server, by step and askers at once: means of a request.", svg))
    ratio, times = figures["in_process"]["ratio"], figures["in_process"]["milliseconds"]
    section.lead.append(
        f"One question at a time takes {times['served']['p50']:.1f} ms through the server and "
        f"{times['in process']['p50']:.1f} ms in process: {ratio['ratio']:.2f} times as long "
        f"({ratio['low']:.2f} to {ratio['high']:.2f}), {figures['in_process']['added_ms']['p50']:.2f} ms more."
    )
    section.lead += [
        f"{askers(load['concurrency'])}: {load['per_second']:.1f} requests a second through the server, "
        f"{load['in_process']['per_second']:.1f} in process with as many threads."
        for load in closed[-1:] if load["in_process"]
    ]  # fmt: skip
    section.tables.append(_loads(figures))


def askers(count: int) -> str:
    """In words."""
    return "1 asker" if count == 1 else f"{count} askers"


def _loads(figures: dict[str, Any]) -> Table:
    named = []
    for load in figures["closed"]:
        named.append((f"closed, {askers(load['concurrency'])}", load))
        if load["in_process"]:
            named.append((f"in process, {askers(load['concurrency'])}", load["in_process"]))
    named += [(f"open, {load['rate']:.1f} a second", load) for load in figures["open"]]
    rows = [
        (name, *(f"{load['milliseconds'][key]:.1f}" if load["milliseconds"] else "–" for key in ("p50", "p95", "p99")),
         f"{load['per_second']:.1f}", str(load["failed"]))
        for name, load in named
    ]  # fmt: skip
    rows += [
        (f"perf_analyzer, {askers(int(found['concurrency']))}",
         *(f"{found[key]:.1f}" if key in found else "–" for key in ("p50", "p95", "p99")),
         f"{found['per_second']:.1f}", "–")
        for found in figures["perf_analyzer"]
    ]  # fmt: skip
    if figures["perf_analyzer_not_run"]:
        rows.append((f"perf_analyzer: {figures['perf_analyzer_not_run']}", "–", "–", "–", "–", "–"))
    return Table("Loads", ("load", "p50 ms", "p95", "p99", "answers a second", "failed"), rows)


def _growth(section: Section, cells: list[dict[str, Any]], axis: str, caption: str) -> Chart:
    cells = sorted(cells, key=lambda cell: cell[axis])
    series: dict[str, tuple[list[float], list[float]]] = {}
    for name in _chosen(cells):
        points = [
            (cell[axis], way["milliseconds"]["p50"]) for cell in cells for way in cell["ways"] if way["name"] == name
        ]
        series[name] = ([x for x, _ in points], [y for _, y in points])
    svg = line_chart(
        series, name=f"{section.anchor}-{axis}", title=f"median latency against {axis}", x=axis, y="milliseconds",
        logarithmic=True, whole_x=True,
    )  # fmt: skip
    return Chart(caption, svg)


def _chosen(cells: list[dict[str, Any]]) -> list[str]:
    """The forms of a chart: ONNX Runtime's before PyTorch's, one K, the plain ones first."""
    ways = [way for cell in cells for way in cell["ways"]]
    first_kept = next((way["kept"] for way in ways if way["kept"]), None)
    wanted = [way for way in ways if way["kept"] in (None, first_kept)]
    wanted.sort(key=lambda way: (way["runtime"] == PYTORCH, way["runtime"] == "torch.compile"))
    return list(dict.fromkeys(way["name"] for way in wanted))[:_LINES]


def _split(cell: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians of the steps of each form that knows them, with what surrounds the graphs."""
    around = {name: times["p50"] for name, times in cell["around"].items()}
    rows = {}
    for way in cell["ways"]:
        if way["name"] in _chosen([cell]) and way["steps"]:
            steps = {step: times["p50"] for step, times in way["steps"].items()}
            rows[way["name"]] = {"preprocess": around["preprocess"], **steps, "decode": around["decode"]}
    return rows


def _findings(cells: list[dict[str, Any]]) -> list[str]:
    """What compaction is worth, and what the rationale costs, where the grid is largest."""
    cell = max(cells, key=lambda cell: (cell["length"], cell["batch"]))
    place = f"at batch {cell['batch']}, length {cell['length']}"
    models = {way["name"]: way for way in cell["ways"]}
    found = []
    for each in cell["ratios"]:
        way, baseline = models[each["way"]], models[each["baseline"]]
        own = way["model"] == COMPACTED and way["runtime"] == baseline["runtime"] and way["graphs"] == 2
        if not own or way["precision"] != baseline["precision"] or way["runtime"] == PYTORCH:
            continue
        what = "blanking words" if baseline["model"] == ZEROED else f"a plain {baseline['model']}"
        where = "" if way["runtime"] == ONNX_CPU else f" on {way['runtime']}"
        found.append(
            f"Reading only the rationale takes {each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f}) of the "
            f"time of {what} {place}{where}, {way['precision']}, K {way['kept']}."
        )
    return found[:4]


def accuracy(section: Section, figures: dict[str, Any]) -> None:
    """Tiles, the curve over rates, the reliability diagram, classes; of a result of the kind 'accuracy'."""
    classification, calibration = figures["classification"], figures["calibration"]
    rate = figures["rate"].get("rate")
    section.tiles += [("accuracy", _percent(classification["accuracy"])), ("kept", _percent(rate)),
                      ("macro F1", _percent(classification["macro_f1"])),
                      ("calibration error", _percent(calibration["ece"]))]  # fmt: skip
    kept = f", reading {rate:.1%} of the input" if rate is not None else ""
    section.lead.append(f"{section.subject} answers {classification['accuracy']:.1%} of the examples correctly{kept}.")
    if reference := figures.get("reference"):
        section.tiles.append(("against the checkpoint", f"{reference['gap_points']:+.2f} points"))
    known = {name: curve for name, curve in figures.get("curve", {}).items() if curve["rates"]}
    curves = {name: (curve["rates"], curve["accuracies"]) for name, curve in known.items()}
    if curves:
        svg = line_chart(
            curves, name=f"{section.anchor}-curve", title="accuracy against the rate", x="share kept", y="accuracy",
            percent=True,
        )  # fmt: skip
        notes = "; ".join(f"{name}: {curve['note']}" for name, curve in known.items() if "note" in curve)
        section.charts.append(Chart(f"Accuracy when the best-scored share of the input is kept. {notes}", svg))
        rates = sorted({rate for rates, _ in curves.values() for rate in rates})
        rows = [(f"{rate:.0%}", *(_at(curve, rate) for curve in curves.values())) for rate in rates]
        areas = tuple(_number(curve.get("area")) for curve in known.values())
        section.tables.append(
            Table("Accuracy by share kept", ("kept", *curves), [*rows, ("area", *areas)], folded=True)
        )
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
        for name, each in _classes(classification["per_class"])
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
        if value is None:
            continue
        rows = _flat(value) if isinstance(value, Mapping) else [("", _shown(value))]
        if rows:
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
        elif not isinstance(value, (list, tuple)):
            rows.append((whole, _shown(value)))
    return rows


def _classes(per_class: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(per_class, Mapping):
        return list(per_class.items())
    return [(str(each.get("label", number)), each) for number, each in enumerate(per_class)]


def _at(curve: tuple[list[float], list[float]], rate: float) -> str:
    return _percent(dict(zip(*curve, strict=True)).get(rate))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _number(value) if value is None or isinstance(value, float) else str(value)
