"""Texts from files, standard input and command lines, one at a time, with the place each came from. torch-free."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from rekd_train.errors import InputError
from rekd_train.preprocess import check_text

STDIN = "-"


class SourcedText(NamedTuple):
    """A text and its place, for messages."""

    text: str
    place: str


def texts_from_arguments(arguments: Iterable[str]) -> Iterator[SourcedText]:
    """Command-line arguments, checked.

    Raises:
        InputError: not UTF-8, or no word in it; names the argument.
    """
    for number, argument in enumerate(arguments, 1):
        place = f"text {number}"
        yield _checked(_decoded(os.fsencode(argument), place), place)


def texts_from_file(file: str) -> Iterator[SourcedText]:
    """The texts of a .jsonl file (key "text"), of a .txt file (one a line), or of standard input ("-").

    Blank lines are skipped. Standard input and files of another name are JSON lines if their first line is.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or holds a line that is no text; names the line.
    """
    shown = "standard input" if file == STDIN else file
    try:
        with nullcontext(sys.stdin.buffer) if file == STDIN else open(file, "rb") as stream:
            yield from _texts_of_lines(stream, shown, {".jsonl": True, ".txt": False}.get(Path(file).suffix))
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror}") from None


def _texts_of_lines(stream: Iterable[bytes], shown: str, as_json: bool | None) -> Iterator[SourcedText]:
    found = False
    for number, raw in enumerate(stream, 1):
        place = f"{shown}, line {number}"
        line = _decoded(raw, place).removeprefix("\ufeff" if number == 1 else "").strip()
        if not line:
            continue
        if as_json is None:
            as_json = _is_record(line)
        found = True
        yield _checked(_text_of_record(line, place) if as_json else line, place)
    if not found:
        raise InputError(f"{shown} holds no text; give one text a line, or JSON lines with the key \"text\"")


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place} is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}; fix: convert it to UTF-8"
        ) from None


def _checked(text: object, place: str) -> SourcedText:
    try:
        return SourcedText(check_text(text, 0), place)
    except InputError as error:
        raise InputError(str(error).replace("text 0", place, 1)) from None


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _text_of_record(line: str, place: str) -> object:
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{place} is not a JSON object with the key "text"') from None
