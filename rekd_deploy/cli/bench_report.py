"""rekd-bench report: result files -> a page for the browser and a summary in Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

NAME = "report"
EXAMPLES = (
    "rekd-bench report benchmarks/results/*.json --output report.html",
    "rekd-bench report benchmarks/results/gpu",
    "rekd-bench report accuracy.json latency.json --answers answers.jsonl --title 'Reviews, March'",
)


def command(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT", help="Result files of rekd-bench, of any kind; folders of benchmarks/gpu.py."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page; the summary lies beside it as .md.")
    ] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading.")] = "What the rationales cost, and what they are worth",
    note: Annotated[list[str] | None, typer.Option(help="A paragraph under the heading.")] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Answers to show with their rationales: lines of rekd-query --json."),
    ] = None,
    show: Annotated[int, typer.Option(min=1, help="Most answers shown of each file.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last line alone.")] = False,
) -> None:
    """Make one self-contained page and a Markdown summary of results."""
    from rekd_deploy.bench.report import Report, read_answers, write_report
    from rekd_deploy.bench.report_gpu import read_gpu
    from rekd_deploy.bench.results import read_result

    shown = [answer for file in answers or [] for answer in read_answers(file, show)]
    found = [read_gpu(path) if path.is_dir() else read_result(path) for path in results]
    report = Report(title, found, shown, tuple(note or ()))
    page, markdown = write_report(report, output, output.with_suffix(".md"))
    if not as_json:
        typer.echo(f"page     {page}\nsummary  {markdown}")
    document = {"kind": "report", "page": str(page), "summary": str(markdown), "bytes": page.stat().st_size}
    sys.stdout.write(json.dumps(document) + "\n")
