"""Tables from files: CSV, TSV, JSON lines and Parquet, read by pandas; what is wrong is said by line."""

from __future__ import annotations

import csv
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_train.data.examples import CharacterSpans
from rekd_train.errors import DataError, MissingExtraError, listed

if TYPE_CHECKING:
    import pandas

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", *JSON_LINES, ".parquet")


class Table:
    """The content of a file, and where in it each row stands."""

    def __init__(self, path: Path, frame: pandas.DataFrame) -> None:
        self.path = path
        self._frame = frame

    def column(self, name: str) -> list[Any]:
        """Values of a column; DataError names the columns that there are."""
        if name not in self._frame.columns:
            raise DataError(
                f"{self.path} has no column '{name}'; it has: {', '.join(map(str, self._frame.columns))}; "
                "fix: --set data.text_column=NAME (label_column, rationale_column, split_column)"
            )
        return self._frame[name].tolist()

    def columns(self) -> dict[str, list[Any]]:
        """The values of every column, by name."""
        return {str(name): self._frame[name].tolist() for name in self._frame.columns}

    def place(self, row: int) -> str:
        """What messages call a row: its file and ``line``."""
        return f"{self.path} {self.line(row)}"

    def line(self, row: int) -> str:
        """'line 2' is where the row begins in the file; 'row 1' is the first, where there are no lines."""
        return f"row {row + 1}" if self._lines is None else f"line {self._lines[row]}"

    @cached_property
    def _lines(self) -> list[int] | None:
        """The line on which each row begins, counted from 1; None for Parquet, and where lines cannot be told."""
        suffix = self.path.suffix.lower()
        if suffix == ".parquet":
            return None
        try:
            if suffix in JSON_LINES:
                with open(self.path, encoding="utf-8-sig") as file:
                    lines = [number for number, line in enumerate(file, 1) if line.strip()]
            else:
                lines = [line for line, _ in _records(self.path)[1:]]
        except (OSError, csv.Error):  # csv: a value longer than the module takes
            return None
        return lines if len(lines) == len(self._frame) else None


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
        elif suffix in JSON_LINES:
            frame = pandas.DataFrame(_json_lines(path))
        else:  # every value as written: pandas would read "NA" and "None" as nothing
            frame = pandas.read_csv(
                path, sep=_separator(path), dtype=str, keep_default_na=False, encoding="utf-8-sig", engine="c"
            )
            if not isinstance(frame.index, pandas.RangeIndex):  # pandas took the first values for the rows' names
                raise pandas.errors.ParserError("the first row has more values than the header")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; fix: --set data.path=FILE") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} cannot be decoded; fix: iconv -f latin1 -t utf-8 {path.name}"
        ) from None
    except pandas.errors.ParserError as error:
        raise DataError(f"{path} cannot be read: {_long_rows(path) or ' '.join(str(error).split())}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if len(frame) == 0:
        raise DataError(f"{path} holds no rows")
    return Table(path, frame)


def label_in(value: Any) -> str:
    """A cell as a label, '' where there is none; 1.0 is '1', for tables turn whole numbers into floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()  # NaN differs from itself


def rationale_in(value: Any, text: str) -> CharacterSpans | None:
    """A cell's human rationale; nothing, NaN or an empty cell mean that nobody annotated the text.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"the rationale {value[:40]!r} is not JSON, a list of [start, end]") from None
    if value is None or (isinstance(value, float) and value != value):
        return None
    try:
        spans = [(int(start), int(end)) for start, end in value]
    except (TypeError, ValueError):
        raise ValueError(f"the rationale {str(value)[:60]} is no list of [start, end]") from None
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            limits = f"0 <= start < end <= {len(text)}, the text's length"
            raise ValueError(f"the rationale holds [{start}, {end}], not {limits}")
    return spans


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows, wrong = [], []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                wrong.append(f"line {number} is not JSON: {error}")
                continue
            if not isinstance(rows[-1], dict):
                wrong.append(f"line {number} is not an object with a text and a label")
    if wrong:
        raise ValueError(listed(wrong))
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


def _separator(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _long_rows(path: Path) -> str:
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
        reader = csv.reader(file, delimiter=_separator(path))
        for record in reader:
            if len(record) > 1 or "".join(record).strip():  # pandas leaves blank lines out
                found.append((line, len(record)))
            line = reader.line_num + 1
    return found
