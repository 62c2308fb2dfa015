"""The user's own texts: CSV, TSV, JSON lines or Parquet, one file or one for each split.

Columns: a text, a label and, if there is one, a human rationale: a list of [start, end] character positions,
in CSV and TSV written as JSON. A text that occurs twice is kept once (``rekd_train.data.duplicates``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekd_train.config.run import DataConfig
from rekd_train.data.classes import class_names, class_numbers, label_fix, unknown_labels
from rekd_train.data.duplicates import find_duplicates
from rekd_train.data.examples import SPLITS, CharacterSpans, DataSet, LabelledTexts
from rekd_train.data.partition import completed
from rekd_train.data.table_files import SUFFIXES, Table, read_table
from rekd_train.errors import DataError, listed

SPLIT_NAMES = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
"""What files, folders and values of a split column may be called."""
_EXCERPT = 60
"""Characters of a text that a message shows."""


def table(config: DataConfig) -> DataSet:
    """Labelled texts from ``data.path``: a file, or a folder with train, dev and test files.

    Without a split column or files for them, dev and test are taken out of the training examples, stratified
    by ``data.seed``.

    Raises:
        DataError: a file that is missing, not UTF-8 or malformed, a missing column; empty texts, bad labels and
            rationales, all of them named with their lines.
        MissingExtraError: pandas or pyarrow is not installed.
    """
    parts, problems = _parts(config)
    found = find_duplicates(
        {split: part.texts for split, part in parts.items()},
        {split: part.labels for split, part in parts.items()},
        lambda split, row: parts[split].place(row),
        lambda text: f": {text[:_EXCERPT]!r}",
    )
    for split, rows in found.kept.items():
        parts[split].keep(rows)
    names = class_names({split: part.labels for split, part in parts.items()}, config.labels)
    _refuse(config, parts, names, problems)
    splits = {split: part.examples(names) for split, part in parts.items()}
    return DataSet(
        splits=completed(splits, config.dev_share, config.test_share, config.seed),
        label_names=names,
        origin=f"texts of the user's own, {Path(config.path).name} "
        f"({found.dropped} duplicates dropped; licence: theirs)",
        duplicates=found.dropped,
        contradictions=found.contradictions,
    )


def every_row(config: DataConfig, names: Sequence[str]) -> LabelledTexts:
    """All texts of ``data.path`` as one split, whatever it says of splits, duplicates and all: to measure a model on.

    Args:
        names: the model's classes, in the order of the logits.

    Raises:
        DataError: as ``table``; labels that are none of the classes.
    """
    parts, problems = _rows(config.model_copy(update={"split_column": ""}), read_table(Path(config.path)), "test")
    _refuse(config, parts, names, problems)
    return parts["test"].examples(names)


class _Part:
    """The rows of one split while they are read.

    Args:
        read: the file that all of them come from.
        prefix: what messages call it; '' where there is no other.
    """

    def __init__(self, read: Table, prefix: str) -> None:
        self._read, self._prefix = read, prefix
        self.texts: list[str] = []
        self.labels: list[str] = []
        self.rationales: list[CharacterSpans | None] = []
        self.rows: list[int] = []

    def add(self, row: int, text: Any, label: Any, rationale: Any) -> list[str]:
        """Take a row, whatever it holds; returns what is wrong with it."""
        wrong = []
        if not isinstance(text, str) or not text.strip():
            text = ""
            wrong.append("the text is empty")
        label = _label(label)
        if not label:
            wrong.append("the label is missing")
        spans = None
        try:
            spans = _spans(rationale, text) if text else None
        except ValueError as error:
            wrong.append(str(error))
        self.texts.append(text)
        self.labels.append(label)
        self.rationales.append(spans)
        self.rows.append(row)
        return [f"{self.place(-1)}: {problem}" for problem in wrong]

    def place(self, index: int) -> str:
        """Where a row of the part stands in its file."""
        return f"{self._prefix}{self._read.line(self.rows[index])}"

    def keep(self, indices: list[int]) -> None:
        """Leave the others out."""
        for column in (self.texts, self.labels, self.rationales, self.rows):
            column[:] = [column[index] for index in indices]

    def examples(self, names: Sequence[str]) -> LabelledTexts:
        """The rows with their labels as class numbers."""
        annotated = any(spans is not None for spans in self.rationales)
        return LabelledTexts(self.texts, class_numbers(self.labels, names), self.rationales if annotated else None)


def _parts(config: DataConfig) -> tuple[dict[str, _Part], list[str]]:
    path = Path(config.path)
    if not path.is_dir():
        return _rows(config, read_table(path), None)
    files = {
        SPLIT_NAMES[file.stem]: file
        for file in sorted(path.iterdir()) if file.stem in SPLIT_NAMES and file.suffix in SUFFIXES
    }
    if "train" not in files:
        raise DataError(f"{path} holds no training file; fix: name one train.csv (or {', '.join(SUFFIXES[1:])})")
    parts: dict[str, _Part] = {}
    problems: list[str] = []
    for split, file in files.items():
        found, wrong = _rows(config, read_table(file), split, f"{file.name} ")
        parts |= found
        problems += wrong
    return parts, problems


def _rows(
    config: DataConfig, read: Table, split: str | None, prefix: str = ""
) -> tuple[dict[str, _Part], list[str]]:
    """The rows of a file by split, and what is wrong with them."""
    texts, labels = read.column(config.text_column), read.column(config.label_column)
    rationales = read.column(config.rationale_column) if config.rationale_column else [None] * len(texts)
    belongs: list[Any] = [split or "train"] * len(texts)
    if config.split_column and split is None:
        belongs = read.column(config.split_column)
    parts: dict[str, _Part] = {}
    problems: list[str] = []
    for row, (text, label, rationale, name) in enumerate(zip(texts, labels, rationales, belongs, strict=True)):
        belonging = SPLIT_NAMES.get(str(name))
        if belonging is None:
            problems.append(f"{prefix}{read.line(row)}: the split '{name}' is none of {', '.join(SPLIT_NAMES)}")
        part = parts.setdefault(belonging or "train", _Part(read, prefix))
        problems += part.add(row, text, label, rationale)
    if split is None and "train" not in parts:
        raise DataError(f"{read.path} holds no row of the split 'train'")
    return {name: parts[name] for name in SPLITS if name in parts}, problems


def _refuse(config: DataConfig, parts: dict[str, _Part], names: Sequence[str], problems: list[str]) -> None:
    """Raise DataError that names everything that is wrong with the rows, if anything is."""
    strangers = [found for part in parts.values() for found in unknown_labels(part.labels, names, part.place)]
    if strangers or problems:
        fix = label_fix(names) if strangers else "fix: correct these rows or take them out"
        raise DataError(f"{config.path}: {listed([*problems, *strangers])}; {fix}")


def _label(value: Any) -> str:
    """Numbers and words alike as words; 1.0 is 1, for tables turn whole numbers into floats; '' if it is missing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()  # NaN differs from itself


def _spans(value: Any, text: str) -> CharacterSpans | None:
    """Human rationale; nothing, NaN or an empty cell mean that nobody annotated the text.

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
