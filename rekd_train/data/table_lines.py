"""Where the rows of a CSV, TSV or JSON lines file stand: messages name lines, as an editor shows them."""

from __future__ import annotations

import csv
from pathlib import Path

from rekd_train.errors import listed

JSON_LINES = (".jsonl", ".ndjson")


def separator(path: Path) -> str:
    """Between the values of a CSV or TSV file."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def row_lines(path: Path, rows: int) -> list[int] | None:
    """The line on which each row begins, counted from 1; None for Parquet, and where lines cannot be told."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return None
    try:
        if suffix in JSON_LINES:
            with open(path, encoding="utf-8-sig") as file:
                lines = [number for number, line in enumerate(file, 1) if line.strip()]
        else:
            lines = [line for line, _ in _records(path)[1:]]
    except (OSError, csv.Error):  # csv: a value longer than the module takes
        return None
    return lines if len(lines) == rows else None


def long_rows(path: Path) -> str:
    """What is wrong with the rows of a CSV or TSV file that have more values than the header; '' if nothing is."""
    try:
        (_, columns), *rows = _records(path)
    except (csv.Error, ValueError):
        return ""
    wrong = [f"line {line} has {count} values" for line, count in rows if count > columns]
    return f"{listed(wrong)}; the header names {columns}; fix: quote values that hold separators" if wrong else ""


def _records(path: Path) -> list[tuple[int, int]]:
    """The first line and the number of values of the header and of each row."""
    found, line = [], 1
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator(path))
        for record in reader:
            if len(record) > 1 or "".join(record).strip():  # pandas leaves blank lines out
                found.append((line, len(record)))
            line = reader.line_num + 1
    return found
