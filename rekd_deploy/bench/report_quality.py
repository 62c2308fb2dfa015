"""The report's sections about answers and rationales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rekd_deploy.bench.charts import line_chart
from rekd_deploy.bench.report_sections import Chart, Section, Table


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
