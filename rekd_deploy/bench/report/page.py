"""Results of rekd-bench -> one page for a browser and one in Markdown. Both are made of the same sections.

The page is one file: charts are inline SVG, images are data, the style is its own, there is no script. It follows
the reader's dark or light, and reads on a phone.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rekd_deploy.bench.report import gpu, sections
from rekd_deploy.bench.report.parts import Section
from rekd_deploy.bench.results import Check, Result
from rekd_deploy.client.render import segments, summary
from rekd_deploy.errors import BenchmarkError
from rekd_train.files import write_text
from rekd_train.inputs.prediction import Prediction, Span

_KINDS: dict[str, tuple[str, Callable[[Section, dict[str, Any]], None]]] = {
    "accuracy": ("Is it right?", sections.accuracy),
    "faithfulness": ("Is the rationale the reason?", sections.faithfulness),
    "latency": ("What does an answer cost?", sections.latency),
    "serving": ("What does it cost when served?", sections.serving),
    "gpu": ("What is it worth on a GPU?", gpu.gpu),
}
"""Title and maker of a section by kind, in the order of the report."""
LARGEST_PAGE = 3_000_000
"""Bytes."""


@dataclass(frozen=True)
class Report:
    """What a report is made of."""

    title: str
    results: Sequence[Result]
    gallery: Sequence[Shown] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    """Paragraphs under the title."""


def write_report(report: Report, page: Path, markdown: Path) -> tuple[Path, Path]:
    """Write both.

    Raises:
        BenchmarkError: there is nothing to report, or the page would be too large.
        MissingExtraError: matplotlib is not installed.
    """
    if not report.results:
        raise BenchmarkError("there is nothing to report; give result files of rekd-bench")
    content = html_page(report)
    size = len(content.encode("utf-8"))
    if size > LARGEST_PAGE:
        raise BenchmarkError(
            f"the page would have {size / 1e6:.1f} MB, {LARGEST_PAGE / 1e6:.0f} are the limit; fix: fewer --answers"
        )
    for path, text in ((Path(page), content), (Path(markdown), markdown_page(report))):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return Path(page), Path(markdown)


def html_page(report: Report) -> str:
    """The page; everything that comes from results or answers is escaped."""
    return _environment(escaped=True).get_template("report.html.j2").render(**_content(report))


def markdown_page(report: Report) -> str:
    """The same in Markdown; charts are left to the page, their figures stand in tables."""
    return _environment(escaped=False).get_template("report.md.j2").render(**_content(report))


def _content(report: Report) -> dict[str, Any]:
    made = sections_of(report.results)
    return {"title": report.title, "notes": report.notes, "verdict": verdict_of(report.results, made),
            "sections": made, "gallery": report.gallery, "results": report.results}  # fmt: skip


def _environment(escaped: bool):
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rekd_deploy.bench.report"), autoescape=escaped, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment


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
    order = list(_KINDS)
    ranked = sorted(results, key=lambda each: order.index(each.kind) if each.kind in order else len(order))
    return [_section(result, f"{result.kind}-{number}") for number, result in enumerate(ranked, 1)]


def verdict_of(results: Sequence[Result], made: Sequence[Section]) -> Verdict:
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
    sentences = [sentence for section in made for sentence in section.lead]
    return Verdict(headline, sentences, checks)


def subject_of(result: Result) -> str:
    """What a result is about, for a heading."""
    roles = [role for role in result.inputs if role.startswith(("repository", "server"))] or list(result.inputs)
    names = list(dict.fromkeys(result.inputs[role].name for role in roles)) or [result.kind]
    precision = result.settings.get("precision")
    return ", ".join(names) + (f" ({precision})" if precision and precision not in names else "")


def _section(result: Result, anchor: str) -> Section:
    title, make = _KINDS.get(result.kind, (result.kind, sections.plain))
    section = Section(anchor, title, subject_of(result), checks=list(result.checks))
    make(section, result.figures)
    return section


# predictions to be looked at

_LONGEST = 900
"""Characters that are shown of a text."""


@dataclass(frozen=True)
class Shown:
    """One answer, ready to be shown."""

    summary: str
    """Label, probability and how much was read."""
    pieces: tuple[tuple[str, bool], ...] = ()
    """Of a text: pieces, each with whether it is part of the rationale."""
    cut: bool = False
    """Whether the end of the text is left out."""
    image: str = ""
    """Of an image: a PNG as a data address, the kept patches bright."""
    words: str = ""
    """Of an image: the kept patches in words, counted from 1."""


def read_answers(path: Path, limit: int) -> list[Shown]:
    """The first answers of a file; short texts before long ones.

    Args:
        path: lines of JSON, as ``rekd-query --json`` prints them; images lie where their line says, or beside the
            file.

    Raises:
        BenchmarkError: the file is missing or a line is no answer.
        InputError: an image cannot be read.
    """
    path = Path(path)
    found: list[tuple[Prediction, str]] = []
    try:
        # not splitlines: texts hold U+0085 and other characters that it takes for a line's end
        with open(path, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found.append(_answer(line, f"{path}, line {number}"))
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}") from None
    found.sort(key=lambda answer: len(answer[0].text) > _LONGEST)
    return [_shown(prediction, image, path) for prediction, image in found[:limit]]


def _answer(line: str, place: str) -> tuple[Prediction, str]:
    try:
        document = json.loads(line)
        image = document.pop("image", "")
        return Prediction.from_dict(document), image
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BenchmarkError(f"{place} is no answer; fix: give what rekd-query --json printed") from None


def _shown(prediction: Prediction, image: str, path: Path) -> Shown:
    if prediction.text:
        cut = len(prediction.text) > _LONGEST
        kept = prediction
        if cut:
            inside = [span for span in prediction.rationale if isinstance(span, Span) and span.end <= _LONGEST]
            kept = replace(prediction, text=prediction.text[:_LONGEST], rationale=inside)
        return Shown(summary(prediction), tuple(segments(kept)), cut)
    if not image:
        raise BenchmarkError(f"{path} holds an image's answer without its image; fix: rekd-query --image FILE --json")
    from rekd_deploy.client.render import highlighted

    file = Path(image)
    beside = path.parent / file.name
    source = file if file.is_file() or not beside.is_file() else beside
    content = io.BytesIO()
    try:
        highlighted(source, prediction).save(content, format="PNG", optimize=True)
    except OSError as error:
        raise BenchmarkError(f"{source} cannot be read: {error.strerror or error}") from None
    address = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    patches = ", ".join(f"row {patch.row + 1} column {patch.column + 1}" for patch in prediction.rationale)
    return Shown(summary(prediction), image=address, words=f"kept patches: {patches}")
