"""The user's own data: tables of texts (in CSV and TSV human rationales are JSON), and folders of images, one a class.

Whatever is wrong is named at once, each with its line or file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import SPLITS, CharacterSpans, DataSet, Examples, LabelledImages, LabelledTexts, completed
from rekd_train.data.table_files import SUFFIXES, Table, label_in, rationale_in, read_table
from rekd_train.errors import DataError, listed
from rekd_train.files import sha256
from rekd_train.inputs.prediction import RATIONALE

SPLIT_NAMES = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
"""What files, folders and values of a split column may be called."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
EXCERPT = 60
"""Characters of a text that a message shows."""


class _Row(NamedTuple):
    """An example as it was read."""

    item: str | Path
    label: str
    """A class name; '' where it is missing."""
    place: str
    """Where it stands, for messages."""
    rationale: CharacterSpans | None = None


_Parts = dict[str, list[_Row]]


def own_data(config: DataConfig) -> DataSet:
    """Labelled texts from ``data.path`` (a file, or a folder with train, dev and test files) or images of any size.

    An example that occurs twice (an image: byte for byte) is kept once. Without a split column, or files or folders for
    them, dev and test are taken out of the training examples, stratified by ``data.seed``.

    Raises:
        DataError: a file that is missing or malformed, a missing column, a folder without images; empty texts, bad
            labels and rationales, all of them named with their lines.
        MissingExtraError: pyarrow, which reads Parquet, is not installed.
    """
    parts, problems = _read(config)
    parts, dropped, contradictions = _each_once(parts)
    names = config.labels or tuple(sorted({row.label for row in parts["train"] if row.label}, key=by_value))
    splits = _labelled(config, parts, names, problems)
    return DataSet(
        splits=completed(splits, config),
        label_names=names,
        origin=f"{config.modality}s of the user's own, {Path(config.path).name} "
        f"({dropped} duplicates dropped; licence: theirs)",
        duplicates=dropped,
        contradictions=contradictions,
    )


def load_whole(config: DataConfig, names: Sequence[str]) -> Examples:
    """Every example of the user's own data as one split, duplicates and all: to measure a model on.

    ``names``: the model's classes, in the order of the logits. Errors as ``own_data``.
    """
    parts, problems = _read(config, whole=True)
    return _labelled(config, parts, names, problems)["test"]


def is_unsplit(config: DataConfig) -> bool:
    """Whether the data are one file of the user's, or one folder of images, that says nothing of splits."""
    path = Path(config.path)
    if config.name == "table":
        return path.is_file() and not config.split_column
    return config.name == "image_folder" and path.is_dir() and "train" not in _split_folders(path)


def _read(config: DataConfig, whole: bool = False) -> tuple[_Parts, list[str]]:
    """The rows of each split and what is wrong with them; ``whole``: all of them as 'test'."""
    path = Path(config.path)
    if config.name == "image_folder":
        return _images(path, whole), []
    if whole or not path.is_dir():
        return _table_rows(config, read_table(path), "test" if whole else None)
    files = {
        SPLIT_NAMES[file.stem]: file
        for file in sorted(path.iterdir()) if file.stem in SPLIT_NAMES and file.suffix in SUFFIXES
    }
    if "train" not in files:
        raise DataError(f"{path} holds no training file; fix: name one train.csv (or {', '.join(SUFFIXES[1:])})")
    parts: _Parts = {}
    problems: list[str] = []
    for split, file in files.items():
        found, wrong = _table_rows(config, read_table(file), split, f"{file.name} ")
        parts |= found
        problems += wrong
    return parts, problems


def _each_once(parts: _Parts) -> tuple[_Parts, int, tuple[str, ...]]:
    """Each example once, in 'test' before 'dev' before 'train' and within a split the first one; so none that measures
    was trained on. Also how many were dropped, and an entry for each that occurs with different labels."""
    first: dict[str, _Row] = {}
    contradicting: dict[str, list[_Row]] = {}
    kept: _Parts = {split: [] for split in SPLITS if split in parts}
    for split in reversed(kept):
        for row in parts[split]:
            key = sha256(row.item) if isinstance(row.item, Path) else row.item
            known = first.setdefault(key, row)
            if known is row:
                kept[split].append(row)
            elif known.label != row.label:
                contradicting.setdefault(key, [known]).append(row)
    entries = []
    for known, *others in contradicting.values():
        excerpt = f": {known.item[:EXCERPT]!r}" if isinstance(known.item, str) else ""
        named = ", ".join(f"{row.place} '{row.label}'" for row in others)
        entries.append(f"{known.place} '{known.label}' (kept), {named}{excerpt}")
    return kept, sum(map(len, parts.values())) - sum(map(len, kept.values())), tuple(entries)


def _labelled(config: DataConfig, parts: _Parts, names: Sequence[str], problems: Sequence[str]) -> dict[str, Examples]:
    """The rows with their labels as class numbers; DataError names everything that is wrong with them."""
    numbers = {name: number for number, name in enumerate(names)}
    strangers = [
        (row.place, row.label) for part in parts.values() for row in part if row.label and row.label not in numbers
    ]
    refuse(config.path, problems, strangers, names)
    splits: dict[str, Examples] = {}
    for split, part in parts.items():
        items, labels = [row.item for row in part], np.array([numbers[row.label] for row in part], dtype=np.int64)
        if config.modality == "image":
            splits[split] = LabelledImages(items, labels)
        else:
            rationales = [row.rationale for row in part]
            annotated = any(spans is not None for spans in rationales)
            splits[split] = LabelledTexts(items, labels, rationales if annotated else None)
    return splits


def refuse(path: str, problems: Sequence[str], strangers: Sequence[tuple[str, str]], names: Sequence[str]) -> None:
    """Raise DataError that names all problems, and all places with a label that is no class; nothing: all is well."""
    fix = "fix: correct these rows or take them out"
    if strangers:
        some = ", ".join(list(names)[:12]) + (", ..." if len(names) > 12 else "")
        fix = f"classes: {some}; fix: correct the labels, or list every class: --set 'data.labels=[\"a\", \"b\"]'"
    unknown = [f"{place}: the label '{label}' is none of the {len(names)} classes" for place, label in strangers]
    if problems or unknown:
        raise DataError(f"{path}: {listed([*problems, *unknown])}; {fix}")


def by_value(label: str) -> tuple[float, str]:
    """Whole numbers by their value, before words."""
    return (float(label) if label.removeprefix("-").isdecimal() else float("inf"), label)


def _table_rows(config: DataConfig, read: Table, split: str | None, prefix: str = "") -> tuple[_Parts, list[str]]:
    """The rows of a file by split (None: its column says which), and what is wrong with them."""
    texts, labels = read.column(config.text_column), read.column(config.label_column)
    rationales = read.column(config.rationale_column) if config.rationale_column else [None] * len(texts)
    belongs = [split or "train"] * len(texts)
    if config.split_column and split is None:
        belongs = read.column(config.split_column)
    parts: _Parts = {}
    problems: list[str] = []
    for number, (text, label, rationale, name) in enumerate(zip(texts, labels, rationales, belongs, strict=True)):
        wrong, spans = [], None
        if (belonging := SPLIT_NAMES.get(str(name))) is None:
            wrong.append(f"the split '{name}' is none of {', '.join(SPLIT_NAMES)}")
        if not isinstance(text, str) or not text.strip():
            text = ""
            wrong.append("the text is empty")
        if not (label := label_in(label)):
            wrong.append("the label is missing")
        try:
            spans = rationale_in(rationale, text) if text else None
        except ValueError as error:
            wrong.append(str(error))
        row = _Row(text, label, f"{prefix}{read.line(number)}", spans)
        parts.setdefault(belonging or "train", []).append(row)
        problems += [f"{row.place}: {problem}" for problem in wrong]
    if split is None and "train" not in parts:
        raise DataError(f"{read.path} holds no row of the split 'train'")
    return {name: parts[name] for name in SPLITS if name in parts}, problems


def _images(root: Path, whole: bool) -> _Parts:
    """Image files by split; those that ``rekd-query --save`` writes (NAME.rationale.png) are left out."""
    if not root.is_dir():
        raise DataError(f"'{root}' is no folder; fix: --set data.path=DIR with one folder for each class")
    folders = _split_folders(root)
    if whole or "train" not in folders:
        folders = {"test" if whole else "train": root}
    return {
        split: [_Row(path, path.parent.name, str(path.relative_to(root))) for path in _images_by_class(folder)]
        for split, folder in folders.items()
    }


def _split_folders(root: Path) -> dict[str, Path]:
    return {SPLIT_NAMES[folder.name]: folder for folder in _folders(root) if folder.name in SPLIT_NAMES}


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_by_class(root: Path) -> Iterator[Path]:
    folders = _folders(root)
    if not folders:
        raise DataError(f"{root} holds no folders of images; fix: one folder for each class")
    for folder in folders:
        names = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        images = [path for path in names if not path.name.lower().endswith(RATIONALE)]
        if not images:
            raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); fix: fill it or remove it")
        yield from images
