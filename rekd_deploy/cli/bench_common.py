"""What the sub-commands of rekd-bench share: options, progress bars, the table, and the last line of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rekd_deploy.bench.results import Progress, Result

RESULTS = Path("benchmarks/results")
"""Where results go unless --output says otherwise."""

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", show_default=f"{RESULTS}/KIND.json", help="Write the result there, as JSON."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the whole result as one line of JSON and nothing else.")
]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """One bar for each step, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Bars(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield report


def finish(
    measured: Result, output: Path | None, as_json: bool, rows: Iterable[tuple[str, ...]], columns: tuple[str, ...]
) -> None:
    """Write the result, show it, end with a line of JSON, and fail if a check did.

    Args:
        output: the result's file; None: its place in ``RESULTS``.
        rows: of the table for people.
        columns: their headings; all but the first are set to the right.

    Raises:
        BenchmarkError: a check failed; the result is written all the same.
    """
    from rekd_deploy.bench.results import write_result
    from rekd_deploy.errors import BenchmarkError

    path = write_result(output or RESULTS / f"{measured.kind}.json", measured)
    if as_json:
        _line_of_json(measured.model_dump(mode="json"))
    else:
        _show(measured, rows, columns)
        typer.echo(f"result: {path}")
        outcomes = {check.name: check.outcome for check in measured.checks}
        _line_of_json({"kind": measured.kind, "result": str(path), "checks": outcomes})
    if measured.failed:
        raise BenchmarkError(
            "; ".join(f"{check.name}: {check.words}" for check in measured.failed) + f"; the figures are in {path}"
        )


def _show(measured: Result, rows: Iterable[tuple[str, ...]], columns: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if measured.checks:
        verdicts = Table()
        for column in ("check", "verdict", "finding"):
            verdicts.add_column(column, overflow="fold")
        for check in measured.checks:
            verdicts.add_row(check.name, check.outcome, check.words)
        console.print(verdicts)


def _line_of_json(document: dict[str, Any]) -> None:
    plain_ascii = "utf" not in (sys.stdout.encoding or "").lower()
    sys.stdout.write(json.dumps(document, ensure_ascii=plain_ascii, allow_nan=False) + "\n")


def numbers(text: str, kind: type, option: str) -> tuple:
    """``1,8`` as numbers; raises a usage error."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers with commas", param_hint=option) from None
