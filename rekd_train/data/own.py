"""The user's own data: tables of texts, folders of images (one a class), and what the package ``datasets`` reads.

One pass looks for what is wrong, all of it named at once with its line, row or file, and for what occurs twice: it
keeps a digest of each example, so texts of ``datasets`` stay on the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import SPLITS, CharacterSpans, DataSet, Examples, LabelledImages, LabelledTexts, completed
from rekd_train.data.table_files import SUFFIXES, Column, Table, in_batches, label_in, opened, rationale_in, read_table
from rekd_train.errors import DataError, listed
from rekd_train.inputs.prediction import RATIONALE

SPLIT_NAMES = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
"""What files, folders and values of a split column may be called."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_EXCERPT = 60  # characters of a text that a message shows


@dataclass(frozen=True)
class _Part:
    """The examples of a split as they were read."""

    examples: Examples  # with labels by ``_Reading.numbers``
    digests: np.ndarray  # (n,) uint64
    rows: np.ndarray  # (n,) int64: where each stands in what was read
    place: Callable[[int], str]  # what messages call a row

    def take(self, chosen: np.ndarray) -> _Part:
        return _Part(self.examples.take(chosen), self.digests[chosen], self.rows[chosen], self.place)


def own_data(config: DataConfig) -> DataSet:
    """Labelled texts or images of any size at ``data.path``.

    A table, a folder with tables train, dev and test, a folder of images; for 'hf' a directory that ``save_to_disk``
    wrote, a directory or file that ``load_dataset`` reads, or a name on the hub, NAME or NAME:CONFIGURATION.

    An example that occurs twice (an image: byte for byte; images of ``datasets`` are not compared) is kept once. Of dev
    and test what is missing is taken out of the training examples, stratified by ``data.seed``.

    DataError: a file that is missing or malformed, a missing column, a folder without images; all empty texts, bad
    labels and rationales, with their lines; MissingExtraError: pyarrow (for Parquet) or datasets is not installed.
    """
    reading = _Reading(config)
    parts = reading.parts()
    before, contradictions = sum(len(part.rows) for part in parts.values()), ()
    if not config.image_column:
        parts, contradictions = reading.each_once(parts)
    dropped = before - sum(len(part.rows) for part in parts.values())
    met = [list(reading.numbers)[number] for number in np.unique(parts["train"].examples.labels) if number]
    by_value = sorted(met, key=lambda label: (float(label) if label.removeprefix("-").isdecimal() else np.inf, label))
    names = config.labels or reading.class_names or tuple(by_value)  # whole numbers stand before words
    origin = f"{config.modality}s {reading.whose} ({dropped} duplicates dropped; licence: {reading.licence})"
    duplicates = None if config.image_column else dropped
    return DataSet(completed(reading.labelled(parts, names), config), names, origin, duplicates, contradictions)


def load_whole(config: DataConfig, names: Sequence[str]) -> Examples:
    """Every example of the user's own data as one split, duplicates and all: to measure a model on.

    ``names``: the model's classes, in the order of the logits. Errors as ``own_data``.
    """
    reading = _Reading(config)
    return reading.labelled(reading.parts(whole=True), names)["test"]


def is_unsplit(config: DataConfig) -> bool:
    """Whether the data are one file of the user's, or one folder of images, that says nothing of splits."""
    path = Path(config.path)
    if config.name == "table":
        return path.is_file() and not config.split_column
    return config.name == "image_folder" and path.is_dir() and "train" not in _split_folders(path)


class _Reading:
    """One pass over the data of a configuration."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.numbers = {"": 0}  # class names, numbered as they are met; '': missing
        self.problems: list[str] = []
        self.class_names: tuple[str, ...] = ()  # where the data themselves say them
        self.whose, self.licence = f"of the user's own, {Path(config.path).name}", "theirs"

    def parts(self, whole: bool = False) -> dict[str, _Part]:
        """The examples of each split; ``whole``: all of them as 'test'."""
        config, path = self.config, Path(self.config.path)
        if config.name == "hf":
            return self._datasets()
        if config.name == "image_folder":
            if not path.is_dir():
                raise DataError(f"'{path}' is no folder; fix: --set data.path=DIR with one folder for each class")
            folders = _split_folders(path)
            if whole or "train" not in folders:
                folders = {"test" if whole else "train": path}
            return {split: self._images(folder, path) for split, folder in folders.items()}
        if whole:
            return {"test": self._table(read_table(path))}
        if not path.is_dir():
            return self._by_split_column(read_table(path))
        found = [file for file in sorted(path.iterdir()) if file.stem in SPLIT_NAMES and file.suffix in SUFFIXES]
        files = {SPLIT_NAMES[file.stem]: file for file in found}
        if "train" not in files:
            raise DataError(f"{path} holds no training file; fix: name one train.csv (or {', '.join(SUFFIXES[1:])})")
        return {split: self._table(read_table(file), f"{file.name} ") for split, file in files.items()}

    def _table(self, table: Table, prefix: str = "") -> _Part:
        config = self.config
        texts, labels = table.column(config.text_column), table.column(config.label_column)
        spans = table.column(config.rationale_column) if config.rationale_column else [None] * len(texts)
        return self._part(texts, zip(texts, labels, spans, strict=True), lambda row: f"{prefix}{table.line(row)}")

    def _by_split_column(self, table: Table) -> dict[str, _Part]:
        if not self.config.split_column:
            return {"train": self._table(table)}
        named = [str(name) for name in table.column(self.config.split_column)]
        self.problems += [f"{table.line(row)}: the split '{name}' is none of {', '.join(SPLIT_NAMES)}"
                          for row, name in enumerate(named) if name not in SPLIT_NAMES]
        part, splits = self._table(table), np.array([SPLIT_NAMES.get(name, "train") for name in named])
        if "train" not in splits:
            raise DataError(f"{table.path} holds no row of the split 'train'")
        return {name: part.take(np.flatnonzero(splits == name)) for name in SPLITS if name in splits}

    def _images(self, folder: Path, root: Path) -> _Part:
        """Without those that ``rekd-query --save`` writes (NAME.rationale.png)."""
        paths: list[Path] = []
        if not (classes := _folders(folder)):
            raise DataError(f"{folder} holds no folders of images; fix: one folder for each class")
        for each in classes:
            names = sorted(path for path in each.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            images = [path for path in names if not path.name.lower().endswith(RATIONALE)]
            if not images:
                raise DataError(f"{each} holds no images ({', '.join(IMAGE_SUFFIXES)}); fix: fill it or remove it")
            paths += images
        rows = ((path, path.parent.name, None) for path in paths)
        return self._part(paths, rows, lambda row: str(paths[row].relative_to(root)))

    def _datasets(self) -> dict[str, _Part]:
        """One split alone is 'train', whatever it is called; one without any label, of a contest, counts as missing."""
        config, found = self.config, opened(self.config.path)
        if len(found) == 1:
            found = {"train": next(iter(found.values()))}
        sources = {SPLIT_NAMES[name]: source for name, source in found.items() if name in SPLIT_NAMES}
        if "train" not in sources:
            raise DataError(f"{config.path} has no split 'train', but {', '.join(found)}; fix: another data.path")
        item = config.image_column or config.text_column
        wanted = [name for name in (item, config.label_column, config.rationale_column) if name]
        for source in sources.values():
            if absent := [name for name in wanted if name not in source.column_names]:
                raise DataError(f"{config.path} has no column {' and no column '.join(map(repr, absent))}; it has: "
                                f"{', '.join(source.column_names)}; fix: --set data.text_column=NAME (image_column, "
                                "label_column, rationale_column)")
        self.class_names = tuple(getattr(sources["train"].features[config.label_column], "names", None) or ())
        self.whose = f"that the package datasets reads at {config.path}"
        self.licence = sources["train"].info.license or "see where they come from"
        parts = {}
        for split in sorted(sources, key=SPLITS.index):
            source, before = sources[split].with_format(None).select_columns(wanted), len(self.problems)
            column = Column(source.select_columns([item]), item, np.arange(len(source)))
            part = self._part(column, self._rows(source, item), lambda row, split=split: f"{split} row {row + 1}")
            if split == "train" or part.examples.labels.any():
                parts[split] = part
            else:
                del self.problems[before:]
        return parts

    def _rows(self, source: Any, item: str) -> Iterator[tuple[Any, Any, Any]]:
        names = getattr(source.features[self.config.label_column], "names", None)  # of a ClassLabel
        images = self.config.modality == "image"
        for batch in in_batches(source.remove_columns([item]) if images else source):  # they are decoded later
            labels, nothing = batch[self.config.label_column], [None] * len(batch[self.config.label_column])
            if names is not None:
                labels = [None if label is None or label < 0 else names[label] for label in labels]
            spans = batch[self.config.rationale_column] if self.config.rationale_column else nothing
            yield from zip(batch.get(item, nothing), labels, spans, strict=True)

    def _part(self, items: Any, rows: Iterable[tuple[Any, Any, Any]], place: Callable[[int], str]) -> _Part:
        """``items`` with what is known of each: itself (None: not read), its label, its rationale."""
        labels, digests = np.zeros(len(items), dtype=np.int64), np.zeros(len(items), dtype=np.uint64)
        rationales: list[CharacterSpans | None] = [None] * len(items)
        images = self.config.modality == "image"
        for row, (item, label, spans) in enumerate(rows):
            wrong = []
            sound = images or (isinstance(item, str) and item.strip())
            if not sound:
                wrong.append("the text is empty")
            labels[row] = self.numbers.setdefault(label_in(label), len(self.numbers))
            if not labels[row]:
                wrong.append("the label is missing")
            if sound and item is not None:
                try:
                    content = item.encode() if isinstance(item, str) else item.read_bytes()
                    digests[row] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
                    rationales[row] = rationale_in(spans, item)
                except (OSError, ValueError) as error:
                    wrong.append(str(error))
            self.problems += [f"{place(row)}: {problem}" for problem in wrong]
        examples = LabelledImages(items, labels) if images else LabelledTexts(items, labels, rationales)
        return _Part(examples, digests, np.arange(len(items)), place)

    def each_once(self, parts: dict[str, _Part]) -> tuple[dict[str, _Part], tuple[str, ...]]:
        """Each example once, in 'test' before 'dev' before 'train' and within a split the first one; so none that
        measures was trained on. Also an entry for each that occurs with different labels."""
        order = [split for split in reversed(SPLITS) if split in parts]
        splits = np.repeat(np.arange(len(order)), [len(parts[split].rows) for split in order])
        places = np.concatenate([np.arange(len(parts[split].rows)) for split in order])
        labels = np.concatenate([parts[split].examples.labels for split in order])
        digests = np.concatenate([parts[split].digests for split in order])
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        kept, names = first[inverse], list(self.numbers)  # for each example, the one that stands for it

        def said(number: int) -> str:
            part = parts[order[splits[number]]]
            return f"{part.place(int(part.rows[places[number]]))} '{names[labels[number]]}'"

        def excerpt(number: int) -> str:
            item = parts[order[splits[number]]].examples.items[int(places[number])]
            return f": {item[:_EXCERPT]!r}" if isinstance(item, str) else ""

        others: dict[int, list[str]] = {}
        for number in np.flatnonzero(labels != labels[kept]):
            others.setdefault(int(kept[number]), []).append(said(number))
        entries = (f"{said(one)} (kept), {', '.join(named)}{excerpt(one)}" for one, named in others.items())
        stays = kept == np.arange(len(kept))
        once = {split: parts[split].take(places[stays & (splits == number)]) for number, split in enumerate(order)}
        return once, tuple(entries)

    def labelled(self, parts: dict[str, _Part], names: Sequence[str]) -> dict[str, Examples]:
        """The examples with their labels as class numbers; DataError names everything that is wrong with them."""
        met, fix = list(self.numbers), "fix: correct these rows or take them out"
        classes = np.array([list(names).index(name) if name in names else -1 for name in met])
        strangers = [f"{part.place(int(row))}: the label '{met[label]}' is none of the {len(names)} classes"
                     for part in parts.values() for row, label in zip(part.rows, part.examples.labels, strict=True)
                     if label and classes[label] < 0]
        if strangers:
            some = ", ".join(list(names)[:12]) + (", ..." if len(names) > 12 else "")
            fix = f"classes: {some}; fix: correct the labels, or list every class: --set 'data.labels=[\"a\", \"b\"]'"
        if self.problems or strangers:
            raise DataError(f"{self.config.path}: {listed([*self.problems, *strangers])}; {fix}")
        return {split: replace(part.examples, labels=classes[part.examples.labels]) for split, part in parts.items()}


def _split_folders(root: Path) -> dict[str, Path]:
    return {SPLIT_NAMES[folder.name]: folder for folder in _folders(root) if folder.name in SPLIT_NAMES}


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
