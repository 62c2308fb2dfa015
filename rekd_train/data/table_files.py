"""Tables: CSV, TSV, JSON lines and Parquet files, and what the package ``datasets`` reads without holding it."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rekd_train.data.examples import CharacterSpans
from rekd_train.errors import DataError, MissingExtraError, listed

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", *JSON_LINES, ".parquet")
_READ_AT_ONCE = 1000
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


class Table(NamedTuple):
    """The content of a file, and where in it each row stands."""

    path: Path
    columns: dict[str, list[Any]]  # the values of each column, by its name; None where a row has none
    lines: list[int] | None  # the line on which each row begins, counted from 1; None for Parquet

    def column(self, name: str) -> list[Any]:
        """Values of a column; DataError names the columns that there are."""
        if name not in self.columns:
            fix = "--set data.text_column=NAME (label_column, rationale_column, split_column)"
            if len(self.columns) == 1 and re.search("[;\t|,]", *self.columns):
                fix = "separate the columns of a .csv with commas, of a .tsv with tabs"
            raise DataError(f"{self.path} has no column '{name}'; it has: {', '.join(self.columns)}; fix: {fix}")
        return self.columns[name]

    def line(self, row: int) -> str:
        """'line 2' is where the row begins in the file; 'row 1' is the first, where there are no lines."""
        return f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"


def read_table(path: Path) -> Table:
    """Read a file by its suffix; values of CSV and TSV are as written, none of them means nothing.

    DataError: missing, of an unknown kind, not UTF-8, malformed or empty; MissingExtraError: pyarrow, which reads
    Parquet, is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; fix: a file of one of these kinds")
    try:
        if suffix == ".parquet":
            table = Table(path, _parquet(path), None)
        else:
            content = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
            separator = "\t" if suffix == ".tsv" else ","
            table = Table(path, *(_json_lines(content) if suffix in JSON_LINES else _separated(content, separator)))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; fix: check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} cannot be decoded; fix: iconv -f latin1 -t utf-8 "
                        f"{path.name}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not any(table.columns.values()):
        raise DataError(f"{path} holds no rows")
    return table


def _separated(content: io.StringIO, separator: str) -> tuple[dict[str, list[Any]], list[int]]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module takes by default
    reader = csv.reader(content, delimiter=separator, strict=True)
    records, lines, line = [], [], 1
    try:
        for record in reader:
            if len(record) > 1 or "".join(record).strip():
                records.append(record)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}; fix: write each quote within a quoted value twice") from None
    header, *rows = records or [[]]
    count = len(header)
    long = [f"line {at} has {len(row)} values" for at, row in zip(lines[1:], rows, strict=True) if len(row) > count]
    if long:
        raise ValueError(f"{listed(long)}; the header names {count}; fix: quote values that hold separators")
    rows = [row + [None] * (count - len(row)) for row in rows]
    return {name: [row[number] for row in rows] for number, name in enumerate(header)}, lines[1:]


def _json_lines(content: io.StringIO) -> tuple[dict[str, list[Any]], list[int]]:
    rows, lines, wrong = [], [], []
    for number, line in enumerate(content, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line.rstrip()))
            lines.append(number)
            if "\\ud" in line.lower():  # surrogates, of which JSON may hold one alone
                json.dumps(rows[-1], ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            wrong.append(f"line {number} is not JSON: {error.msg}, at its character {error.pos + 1}")
            continue
        except UnicodeEncodeError:
            wrong.append(f"line {number} holds half a character, such as an emoji that was cut in two")
        if not isinstance(rows[-1], dict):
            wrong.append(f"line {number} is not an object such as {{\"text\": ...}}")
    if wrong:
        raise ValueError(listed(wrong))
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, lines


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    try:
        return parquet.read_table(path).to_pydict()
    except ArrowException as error:
        raise ValueError(error) from None


def label_in(value: Any) -> str:
    """A cell as a label, '' where there is none; 1.0 is '1', for tables turn whole numbers into floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()  # NaN differs from itself


def rationale_in(value: Any, text: str) -> CharacterSpans | None:
    """A cell's human rationale; nothing, NaN or an empty cell mean that nobody annotated the text. Else ValueError."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"the rationale {value[:40]!r} is not JSON, a list of [start, end]") from None
    if value is None or isinstance(value, str) or (isinstance(value, float) and value != value):
        return None
    try:
        spans = [(int(start), int(end)) for start, end in value]
    except (TypeError, ValueError):
        raise ValueError(f"the rationale {str(value)[:60]} is no list of [start, end]") from None
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            raise ValueError(f"the rationale holds [{start}, {end}], not 0 <= start < end <= {len(text)}, the text's "
                             "length")
    return spans


def opened(path: str) -> Mapping[str, Any]:
    """The splits that the package ``datasets`` finds at a path or name, memory-mapped; errors as ``read_table``."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data") from None
    local, on_the_hub = Path(path), _HUB_NAME.fullmatch(path)
    try:
        if any((local / name).is_file() for name in ("dataset_dict.json", "state.json")):  # of save_to_disk
            found = datasets.load_from_disk(path)
        elif local.is_dir():
            found = datasets.load_dataset(path)
        elif local.is_file():
            found = datasets.load_dataset(str(local.parent), data_files=local.name)
        elif on_the_hub:
            found = datasets.load_dataset(*on_the_hub.groups())
        else:
            raise DataError(f"{path} does not exist; fix: --set data.path=DIR, FILE, or OWNER/NAME on the hub")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path} cannot be read by the package datasets: {reason}; fix: another data.path") from None
    return found if isinstance(found, dict) else {"train": found}


def in_batches(rows: Any) -> Iterator[Any]:
    """What slices of a column or a ``datasets.Dataset`` hold, one after the other."""
    for start in range(0, len(rows), _READ_AT_ONCE):
        yield rows[start : start + _READ_AT_ONCE]


@dataclass(frozen=True)
class Column(Sequence):
    """Texts or images of some rows of a ``datasets.Dataset``, in any order, read when they are asked for."""

    source: Any
    name: str
    rows: np.ndarray  # (n,) int64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Any) -> Any:
        """One value of an index, a list of a slice; of an array of indices a column, which reads nothing."""
        rows = self.rows[chosen]
        if isinstance(chosen, np.ndarray):
            return replace(self, rows=rows)
        try:
            return self.source[rows if isinstance(chosen, slice) else int(rows)][self.name]
        except (OSError, SyntaxError, ValueError) as error:  # an image is decoded here
            where = f"rows {rows.min() + 1} to {rows.max() + 1}"
            raise DataError(f"column '{self.name}', {where}: {error}; fix: take out what is damaged") from None

    def __iter__(self) -> Iterator[Any]:
        for batch in in_batches(self):
            yield from batch

    def __add__(self, more: list[str]) -> Column:
        from datasets import Dataset, concatenate_datasets

        added = Dataset.from_dict({self.name: more}, features=self.source.features)
        rows = np.concatenate([self.rows, len(self.source) + np.arange(len(more))])
        return Column(concatenate_datasets([self.source, added]), self.name, rows)
