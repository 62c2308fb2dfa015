"""rekd-bench compare: did anything become worse between two results?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rekd_deploy.bench.compare import Comparison

NAME = "compare"
EXAMPLES = (
    "rekd-bench compare old.json new.json --fail-above 10%",
    "rekd-bench compare main/accuracy.json branch/accuracy.json --fail-points 0.5",
)


def command(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Result file of rekd-bench.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another of the same kind.")],
    fail_above: Annotated[
        str, typer.Option(metavar="PERCENT", help="Largest change for the worse of times, as 10%.")
    ] = "10%",
    fail_points: Annotated[
        float, typer.Option(min=0.0, help="Largest change for the worse of accuracies, in percentage points.")
    ] = 1.0,
    other_hardware: Annotated[
        bool, typer.Option("--other-hardware", help="Compare although the machines differ.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as one line of JSON and nothing else.")
    ] = False,
) -> None:
    """Match the figures of two results; exit code 1 if one is worse beyond the limit and beyond the noise."""
    from rekd_deploy.bench.compare import compare
    from rekd_deploy.bench.results import read_result
    from rekd_deploy.errors import BenchmarkError

    limit = _percent(fail_above)
    found = compare(
        read_result(old), read_result(new), percent=limit, points=fail_points, other_hardware=other_hardware
    )
    if not as_json:
        _show(found)
    sys.stdout.write(json.dumps(found.to_dict(), ensure_ascii=True) + "\n")
    if found.failed:
        raise BenchmarkError(f"worse than {old}: {'; '.join(found.failed)}")


def _percent(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"'{text}' is no percentage; give one as 10%", param_hint="--fail-above")
    return value


def _show(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table()
    for column in ("figure", "old", "new", "change", "verdict"):
        table.add_column(column, justify="left" if column in ("figure", "verdict") else "right", overflow="fold")
    for change in found.changes:
        unit = " points" if change.old.points else " %"
        table.add_row(
            change.name, f"{change.old.value:.4g}", f"{change.new.value:.4g}", f"{change.change:+.1f}{unit}",
            change.outcome,
        )  # fmt: skip
    console.print(table)
    notes = {"only in the old": found.only_old, "only in the new": found.only_new, "note": found.notes}
    for title, lines in {**notes, "fails now": found.broken}.items():
        for line in lines:
            console.print(f"{title}: {line}", soft_wrap=True)
