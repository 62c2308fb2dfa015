"""What a report says: for each result a section of words, tables and charts, and a verdict over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rekd_deploy.bench.results import Check, Result

TITLES = {
    "accuracy": "Is it right?",
    "faithfulness": "Is the rationale the reason?",
    "latency": "What does an answer cost?",
    "serving": "What does it cost when served?",
    "gpu": "What is it worth on a GPU?",
}
"""In the order of the report."""


@dataclass(frozen=True)
class Table:
    """Columns after the first are set to the right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    folded: bool = False
    """Whether it is shown only when asked for: long ones."""


@dataclass(frozen=True)
class Chart:
    """An inline SVG and what it shows."""

    caption: str
    svg: str


@dataclass
class Section:
    """One result; its maker adds to the lists."""

    anchor: str
    title: str
    subject: str
    """What was measured."""
    lead: list[str] = field(default_factory=list)
    """What comes out of it, in sentences."""
    tiles: list[tuple[str, str]] = field(default_factory=list)
    """A few figures that stand out: name, value."""
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What passed, in plain words."""

    headline: str
    sentences: list[str]
    checks: list[tuple[str, Check]]
    """Subject and check; failures first."""


def sections_of(results: Sequence[Result]) -> list[Section]:
    """A section for each result, by kind; kinds that are not known come last, as plain tables.

    Raises:
        BenchmarkError: a result lacks figures of its kind.
        MissingExtraError: matplotlib is not installed.
    """
    order = list(TITLES)
    ranked = sorted(results, key=lambda each: order.index(each.kind) if each.kind in order else len(order))
    return [_section(result, f"{result.kind}-{number}") for number, result in enumerate(ranked, 1)]


def verdict_of(results: Sequence[Result], sections: Sequence[Section]) -> Verdict:
    """Counts, and every check; failures first, then what passed, then what was not applicable."""
    checks = [(subject_of(result), check) for result in results for check in result.checks]
    rank = {"failed": 0, "passed": 1, "not applicable": 2}
    checks.sort(key=lambda each: rank[each[1].outcome])
    counts = Counter(check.outcome for _, check in checks)
    if counts["failed"]:
        headline = f"{counts['failed']} of {counts['failed'] + counts['passed']} checks failed"
    elif counts["passed"]:
        headline = f"All {counts['passed']} checks passed" if counts["passed"] > 1 else "The one check passed"
    else:
        headline = "No check applied"
    if counts["not applicable"]:
        headline += f", {counts['not applicable']} did not apply"
    sentences = [sentence for section in sections for sentence in section.lead]
    return Verdict(headline, sentences, checks)


def subject_of(result: Result) -> str:
    """What a result is about, for a heading."""
    roles = [role for role in result.inputs if role.startswith(("repository", "server"))] or list(result.inputs)
    names = list(dict.fromkeys(result.inputs[role].name for role in roles)) or [result.kind]
    precision = result.settings.get("precision")
    return ", ".join(names) + (f" ({precision})" if precision and precision not in names else "")


def _section(result: Result, anchor: str) -> Section:
    from rekd_deploy.bench import report_costs, report_gpu, report_quality

    makers: dict[str, Callable[[Section, dict[str, Any]], None]] = {
        "accuracy": report_quality.accuracy, "faithfulness": report_quality.faithfulness,
        "latency": report_costs.latency, "serving": report_costs.serving, "gpu": report_gpu.gpu,
    }  # fmt: skip
    section = Section(
        anchor, TITLES.get(result.kind, result.kind), subject_of(result), checks=list(result.checks)
    )
    makers.get(result.kind, report_quality.plain)(section, result.figures)
    return section
