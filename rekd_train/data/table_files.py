"""Tables from files: CSV, TSV, JSON lines and Parquet, read by pandas; what is wrong is said by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_train.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import pandas

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


class Table:
    """A table that knows where it comes from.

    Args:
        path: its file.
        frame: its content.
    """

    def __init__(self, path: Path, frame: pandas.DataFrame) -> None:
        self.path = path
        self._frame = frame

    def column(self, name: str) -> list[Any]:
        """Values of a column; DataError names the columns that there are."""
        if name not in self._frame.columns:
            there = ", ".join(str(column) for column in self._frame.columns)
            raise DataError(
                f"{self.path} has no column '{name}'; it has: {there}; "
                "fix: --set data.text_column=NAME (label_column, rationale_column, split_column)"
            )
        return self._frame[name].tolist()

    def columns(self) -> dict[str, list[Any]]:
        """The values of every column, by name."""
        return {str(name): self._frame[name].tolist() for name in self._frame.columns}

    def place(self, row: int) -> str:
        """What messages call a row: counted from 1, a header not counted."""
        return f"{self.path} row {row + 1}"


def read_table(path: Path) -> Table:
    """Read a file by its suffix.

    Raises:
        DataError: missing, of an unknown kind, not UTF-8, malformed or empty.
        MissingExtraError: pandas or pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; fix: --set data.path=FILE")
    try:
        import pandas
    except ImportError:
        raise MissingExtraError("pandas", "data") from None
    try:
        if suffix == ".parquet":
            frame = _parquet(path)
        elif suffix in (".jsonl", ".ndjson"):
            frame = pandas.DataFrame(_json_lines(path))
        else:  # every value as written: pandas would read "NA" and "None" as nothing
            separator = "\t" if suffix == ".tsv" else ","
            frame = pandas.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", engine="c"
            )
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; fix: --set data.path=FILE") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} cannot be decoded; fix: iconv -f latin1 -t utf-8 {path.name}"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if len(frame) == 0:
        raise DataError(f"{path} holds no rows")
    return Table(path, frame)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object with a text and a label")
            rows.append(row)
    return rows


def _parquet(path: Path) -> pandas.DataFrame:
    import pandas

    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    try:
        return pandas.read_parquet(path, engine="pyarrow")
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None
