"""Results of rekd-bench -> one page for a browser and one in Markdown. Both are made of the same sections.

The page is one file: charts are inline SVG, images are data, the style is its own, there is no script. It follows
the reader's dark or light, and reads on a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekd_deploy.bench.gallery import Shown
from rekd_deploy.bench.report_sections import Section, sections_of, verdict_of
from rekd_deploy.bench.results import Result
from rekd_deploy.errors import BenchmarkError
from rekd_train.files import write_text

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
    sections: list[Section] = sections_of(report.results)
    return {
        "title": report.title,
        "notes": report.notes,
        "verdict": verdict_of(report.results, sections),
        "sections": sections,
        "gallery": report.gallery,
        "results": report.results,
    }


def _environment(escaped: bool):
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rekd_deploy.bench"), autoescape=escaped, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment
