"""Texts from files, standard input and command lines, one at a time, each with its number and what came with it.

Every text that cannot be used is named, by its line. Of a file, all are read to name them together, and no text comes
after the first of them; of standard input, which may never end, each may be reported and left out. torch-free.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rekd_train.errors import Fault, FaultyItemsError, InputError
from rekd_train.inputs.text import text_fault

if TYPE_CHECKING:
    from rekd_train.data.table_files import Table

STDIN = "-"
TEXT = "text"
"""The column of a table or key of JSON lines that is read where none is named."""
TABLES = (".csv", ".tsv", ".parquet")
_AS_JSON = {".jsonl": True, ".ndjson": True, ".json": True, ".txt": False}


class SourcedText(NamedTuple):
    """A text and where it comes from."""

    text: str
    number: int
    """Of the text, the line or (in a table) the row, counted from 1."""
    record: Mapping[str, Any]
    """The other keys of its JSON object, or the other columns of its row."""


class TextSource:
    """Where texts come from.

    Args:
        file: .csv, .tsv and .parquet: a table; .jsonl, .ndjson, .json: JSON lines; .txt: one text a line; "-": standard
            input. Standard input and files of another name are JSON lines if their first line is. None: ``arguments``.
        column: of a table, or key of JSON lines; None: "text", else the only column of a table that holds texts.
        arguments: texts as a command line has them.
        report: takes the error of texts of standard input that cannot be used, which are left out; None: raised.
    """

    def __init__(
        self, file: str | None = None, column: str | None = None, arguments: Sequence[str] = (),
        report: Callable[[FaultyItemsError], object] | None = None,
    ) -> None:
        self._file, self._column, self._arguments = file, column, arguments
        self._suffix = Path(file or "").suffix.lower()
        self._shown = "standard input" if file == STDIN else file
        self._table: Table | None = None
        self._report = report if file == STDIN else None
        self.left_out = 0  # texts that were reported

    def leaves_out(self, faults: Mapping[int, Fault]) -> bool:
        """Report texts that were read, by their lines; False: they must be raised."""
        if self._report is None:
            return False
        self._report(self.refusal(faults))
        self.left_out += len(faults)
        return True

    def refusal(self, faults: Mapping[int, Fault]) -> FaultyItemsError:
        """The error that names texts that were read, by their lines."""
        table, unit = self._table, "text" if self._file is None else "line"
        name = (lambda number: table.line(number - 1)) if table is not None else f"{unit} {{}}".format
        return FaultyItemsError(faults, name, self._shown)

    def __iter__(self) -> Iterator[SourcedText]:
        """The texts before the first that cannot be used, or all but those that are left out.

        Raises:
            InputError: the file cannot be read, holds no text, or lacks the column.
            FaultyItemsError: texts that cannot be used; after all of the file has been read.
            MissingExtraError: pyarrow, which reads Parquet, is not installed.
        """
        faults: dict[int, Fault] = {}
        for number, value, record in self._values():
            fault = value if isinstance(value, Fault) else text_fault(value)
            if fault is not None and not self.leaves_out({number: fault}):
                faults[number] = fault
            elif fault is None and not faults:
                yield SourcedText(value, number, record)
        if faults:
            raise self.refusal(faults)

    def chunks(self, size: int) -> Iterator[list[SourcedText]]:
        """Lists of up to ``size`` texts; those of a file before a bad one come before the error."""
        chunk: list[SourcedText] = []
        error = None
        try:
            for sourced in self if self._file is not None else list(self):
                chunk.append(sourced)
                if len(chunk) == size:
                    yield chunk
                    chunk = []
        except InputError as found:
            error = found
        if chunk:
            yield chunk
        if error is not None:
            raise error

    def _values(self) -> Iterator[tuple[int, Any, Mapping[str, Any]]]:
        """Number, text or fault, and record of everything that there is."""
        if self._file is None:
            yield from ((number, _decoded(os.fsencode(text)), {}) for number, text in enumerate(self._arguments, 1))
            return
        try:
            with nullcontext(sys.stdin.buffer) if self._file == STDIN else open(self._file, "rb") as stream:
                yield from self._rows() if self._suffix in TABLES else self._lines(stream)
        except OSError as error:
            raise InputError(f"{self._shown} cannot be read: {error.strerror}; fix: check the path") from None

    def _lines(self, stream: Iterable[bytes]) -> Iterator[tuple[int, Any, Mapping[str, Any]]]:
        as_json, found = _AS_JSON.get(self._suffix), False
        for number, raw in enumerate(stream, 1):
            line = _decoded(raw)
            if isinstance(line, str):
                line = line.removeprefix("\ufeff" if number == 1 else "").strip()
                if as_json is None and line:
                    as_json = isinstance(_json(line), dict)
            if line:
                found = True
                yield number, *(self._of_record(line) if as_json and isinstance(line, str) else (line, {}))
        if not found:
            fix = 'give one text a line, or JSON lines with the key "text"'
            raise InputError(f"{self._shown} holds no text; fix: {fix}")

    def _of_record(self, line: str) -> tuple[Any, Mapping[str, Any]]:
        key, record = self._column or TEXT, _json(line)
        if isinstance(record, dict) and key in record:
            return record.pop(key), record
        other = " (or name another key with --column NAME)" if isinstance(record, dict) else ""
        return Fault(f'is not a JSON object with the key "{key}"', f'write {{"{key}": "..."}}{other}, one a line'), {}

    def _rows(self) -> Iterator[tuple[int, Any, Mapping[str, Any]]]:
        from rekd_train.data.table_files import read_table

        self._table = read_table(Path(self._file or ""))
        columns = self._table.columns
        holding = [name for name, values in columns.items() if _are_texts(values)]
        text = self._column or (holding[0] if TEXT not in columns and len(holding) == 1 else TEXT)
        if text not in columns:
            fix = f"call the column of texts '{TEXT}', or name it with --column NAME"
            raise InputError(f"{self._shown} has no column '{text}'; it has: {', '.join(columns)}; fix: {fix}")
        for number, values in enumerate(zip(*columns.values(), strict=True), 1):
            record = dict(zip(columns, values, strict=True))
            yield number, record.pop(text), record


def _are_texts(values: list[Any]) -> bool:
    """Whether most have more than one word."""
    return sum(isinstance(value, str) and len(value.split()) > 1 for value in values) * 2 > len(values)


def _decoded(raw: bytes) -> str | Fault:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return Fault(f"is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}", "convert it to UTF-8")


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # brackets without end
        return None
