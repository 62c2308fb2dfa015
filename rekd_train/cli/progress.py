"""What a run shows: on stderr while it goes its data and progress bars, in the end tables and warnings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from rekd_train.cli.command import print_json


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, framed: bool = True, console=None
) -> None:
    """A table on stdout or another console; all columns but the first ``left`` hold figures, flush right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table() if framed else Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    (console or Console()).print(table)


@contextmanager
def progress_bars():
    """An observer that shows one bar a stage on stderr; None in processes but the first of several."""
    if os.environ.get("RANK", "0") != "0":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.fields[shown]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        yield _Bars(progress)


class _Bars:
    def __init__(self, progress) -> None:
        self._progress = progress
        self._task = None
        self._shown = {}
        self._summary: dict[str, Any] = {}

    def data(self, summary: dict[str, Any]) -> None:
        if summary == self._summary:  # several runs on the same data, as the demo's
            return
        self._summary = summary
        from rekd_train.data.examples import summary_notes, summary_rows

        print_table(("data", *summary["splits"]), summary_rows(summary), framed=False, console=self._progress.console)
        for note in summary_notes(summary):
            self._progress.console.print(note, markup=False, highlight=False)

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._shown = {}
        self._task = self._progress.add_task(name, total=steps, completed=start, shown="")

    def step(self, values: dict[str, float]) -> None:
        self._shown |= {key: values[key] for key in ("loss", "selection_rate") if key in values}
        self._progress.update(self._task, advance=1, shown=self._text())

    def evaluated(self, values: dict[str, float]) -> None:
        self._shown["dev"] = values["accuracy"]
        self._progress.update(self._task, shown=self._text())

    def note(self, text: str) -> None:
        self._progress.console.print(f"note: {text}", soft_wrap=True, markup=False, highlight=False)

    def _text(self) -> str:
        return "  ".join(f"{key} {value:.4f}" for key, value in self._shown.items())


def class_warnings(never: dict[str, list[str]]) -> list[str]:
    """A line wherever classes are predicted for no example; ``never``: those classes by what was measured."""
    return [
        f"warning: on {measured} no example is predicted as {', '.join(names)}; "
        "fix: --set data.class_weights=balanced, --set stages.best_metric=macro_f1, or more examples"
        for measured, names in never.items() if names
    ]  # fmt: skip


def report_metrics(metrics: dict, path: Path, as_json: bool) -> None:
    """Print what a run has measured, by split."""
    if not metrics:  # of several processes, one reports
        return
    if as_json:
        print_json({"checkpoint": str(path), **metrics})
        return
    from rekd_train.evaluation.report import shown

    never = {split: figures["never_predicted"] for split, figures in metrics.items()}
    keys = [key for key in next(iter(metrics.values())) if key != "never_predicted" or any(never.values())]
    typer.echo(f"{path} (noise-free, by the stored policy)")  # not as the table's title, which would be folded
    print_table(("figure", *metrics), [(key, *(shown(figures[key]) for figures in metrics.values())) for key in keys])
    for line in class_warnings(never):
        typer.echo(line)
