"""Progress bars of training on stderr."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager


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

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._shown = {}
        self._task = self._progress.add_task(name, total=steps, completed=start, shown="")

    def step(self, values: dict[str, float]) -> None:
        self._shown |= {key: values[key] for key in ("loss", "rate") if key in values}
        self._progress.update(self._task, advance=1, shown=self._text())

    def evaluated(self, values: dict[str, float]) -> None:
        self._shown["dev"] = values["accuracy"]
        self._progress.update(self._task, shown=self._text())

    def note(self, text: str) -> None:
        self._progress.console.print(f"note: {text}", soft_wrap=True, markup=False, highlight=False)

    def _text(self) -> str:
        return "  ".join(f"{key} {value:.4f}" for key, value in self._shown.items())
