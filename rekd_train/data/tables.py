"""The user's own texts: CSV, TSV, JSON lines or Parquet, one file or one for each split.

Columns: a text, a label and, if there is one, a human rationale: a list of [start, end] character positions,
in CSV and TSV written as JSON. A text that occurs twice is kept once, so that no test text is trained on:
in 'test' before 'dev' before 'train', and within a split the first one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekd_train.config import DataConfig
from rekd_train.data.classes import class_names, class_numbers
from rekd_train.data.examples import SPLITS, CharacterSpans, DataSet, LabelledTexts
from rekd_train.data.partition import completed
from rekd_train.data.table_files import SUFFIXES, Table, read_table
from rekd_train.errors import DataError

SPLIT_NAMES = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
"""What files, folders and values of a split column may be called."""


def table(config: DataConfig) -> DataSet:
    """Labelled texts from ``data.path``: a file, or a folder with train, dev and test files.

    Without a split column or files for them, dev and test are taken out of the training examples, stratified
    by ``data.seed``.

    Raises:
        DataError: a file that is missing, not UTF-8 or malformed, a missing column, an empty text, a bad
            label or rationale; names file and row.
        MissingExtraError: pandas or pyarrow is not installed.
    """
    parts = _parts(config)
    dropped = _drop_duplicates(parts)
    names = class_names({split: part.labels for split, part in parts.items()}, config.labels)
    splits = {
        split: LabelledTexts(
            part.texts, class_numbers(part.labels, names, part.places),
            part.rationales if any(spans is not None for spans in part.rationales) else None,
        )
        for split, part in parts.items()
    }  # fmt: skip
    return DataSet(
        splits=completed(splits, config.dev_share, config.test_share, config.seed),
        label_names=names,
        origin=f"texts of the user's own, {Path(config.path).name} ({dropped} duplicates dropped; licence: theirs)",
    )


def every_row(config: DataConfig, names: Sequence[str]) -> LabelledTexts:
    """All texts of ``data.path`` as one split, whatever it says of splits, duplicates and all: to measure a model on.

    Args:
        names: the model's classes, in the order of the logits.

    Raises:
        DataError: as ``table``; a label that is none of the classes.
    """
    part = _rows(config.model_copy(update={"split_column": ""}), read_table(Path(config.path)), "test")["test"]
    rationales = part.rationales if any(spans is not None for spans in part.rationales) else None
    return LabelledTexts(part.texts, class_numbers(part.labels, names, part.places), rationales)


class _Part:
    """The rows of one split while they are read."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.labels: list[str] = []
        self.rationales: list[CharacterSpans | None] = []
        self.places: list[str] = []

    def add(self, text: str, label: str, rationale: CharacterSpans | None, place: str) -> None:
        self.texts.append(text)
        self.labels.append(label)
        self.rationales.append(rationale)
        self.places.append(place)

    def keep(self, rows: list[int]) -> None:
        for column in (self.texts, self.labels, self.rationales, self.places):
            column[:] = [column[row] for row in rows]


def _parts(config: DataConfig) -> dict[str, _Part]:
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
    for split, file in files.items():
        parts |= _rows(config, read_table(file), split)
    return parts


def _rows(config: DataConfig, read: Table, split: str | None) -> dict[str, _Part]:
    texts, labels = read.column(config.text_column), read.column(config.label_column)
    rationales = read.column(config.rationale_column) if config.rationale_column else [None] * len(texts)
    belongs: list[Any] = [split or "train"] * len(texts)
    if config.split_column and split is None:
        belongs = read.column(config.split_column)
    parts: dict[str, _Part] = {}
    for row, (text, label, rationale, name) in enumerate(zip(texts, labels, rationales, belongs, strict=True)):
        place = read.place(row)
        if str(name) not in SPLIT_NAMES:
            raise DataError(f"{place}: the split '{name}' is none of {', '.join(SPLIT_NAMES)}")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: the text is empty; fix: fill it in or take the row out")
        part = parts.setdefault(SPLIT_NAMES[str(name)], _Part())
        part.add(text, _label(label, place), _spans(rationale, text, place), place)
    if split is None and "train" not in parts:
        raise DataError(f"{read.path} holds no row of the split 'train'")
    return {name: parts[name] for name in SPLITS if name in parts}


def _label(value: Any, place: str) -> str:
    """Numbers and words alike as words; 1.0 is 1, for tables turn whole numbers into floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None or value != value else str(value).strip()  # NaN differs from itself
    if not text:
        raise DataError(f"{place}: the label is missing; fix: fill it in or take the row out")
    return text


def _spans(value: Any, text: str, place: str) -> CharacterSpans | None:
    """Human rationale; nothing, NaN or an empty cell mean that nobody annotated the text."""
    fix = f"write a list of [start, end] with 0 <= start < end <= {len(text)}, the length of the text"
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError(f"{place}: the rationale {value[:40]!r} is not JSON; fix: {fix}") from None
    if value is None or (isinstance(value, float) and value != value):
        return None
    try:
        spans = [(int(start), int(end)) for start, end in value]
    except (TypeError, ValueError):
        raise DataError(f"{place}: the rationale {str(value)[:60]} is no list of pairs; fix: {fix}") from None
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            raise DataError(f"{place}: the rationale holds [{start}, {end}]; fix: {fix}")
    return spans


def _drop_duplicates(parts: dict[str, _Part]) -> int:
    """Keep each text once, in the split that measures rather than in the one that trains."""
    seen: set[str] = set()
    dropped = 0
    for name in reversed(SPLITS):
        if name in parts:
            rows = []
            for row, text in enumerate(parts[name].texts):
                if text not in seen:
                    rows.append(row)
                    seen.add(text)
            dropped += len(parts[name].texts) - len(rows)
            parts[name].keep(rows)
    return dropped
