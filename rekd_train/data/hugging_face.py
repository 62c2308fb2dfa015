"""Data sets of the package ``datasets``, memory-mapped: a text is read where it is tokenised, and not kept.

One pass looks for what is wrong and for what occurs twice; of a text it keeps a digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import SPLITS, CharacterSpans, DataSet, Examples, LabelledImages, LabelledTexts, completed
from rekd_train.data.own import EXCERPT, SPLIT_NAMES, by_value, refuse
from rekd_train.data.table_files import label_in, rationale_in
from rekd_train.errors import DataError, MissingExtraError

_READ_AT_ONCE = 1000
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


@dataclass(frozen=True)
class Column(Sequence):
    """Texts or images of some rows, in any order, read from the disk when they are asked for."""

    source: Any
    """A ``datasets.Dataset``."""
    name: str
    rows: np.ndarray
    """(n,) int64."""

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
        for start in range(0, len(self), _READ_AT_ONCE):
            yield from self[start : start + _READ_AT_ONCE]

    def __add__(self, more: list[str]) -> Column:
        from datasets import Dataset, concatenate_datasets

        added = Dataset.from_dict({self.name: more}, features=self.source.features)
        rows = np.concatenate([self.rows, len(self.source) + np.arange(len(more))])
        return Column(concatenate_datasets([self.source, added]), self.name, rows)


def hugging_face_data(config: DataConfig) -> DataSet:
    """Texts, or images (``data.image_column``), that ``datasets`` reads at ``data.path``.

    That is a directory that ``save_to_disk`` wrote, a directory or file that ``load_dataset`` reads, or a name on the
    hub, ``owner/name`` or ``owner/name:config``. A text that occurs twice is kept once, as in a table. A dev or test
    split without any label counts as missing.

    Raises:
        DataError: nothing that can be read, missing columns; empty texts, bad labels and rationales, all of them named.
        MissingExtraError: ``datasets`` is not installed.
    """
    sources = _splits(config)
    numbers = {"": 0}
    problems: list[str] = []
    parts: dict[str, Any] = {}
    digests: dict[str, np.ndarray] = {}
    for split, source in sources.items():
        wrong: list[str] = []
        examples, digests[split] = _read(config, split, source, numbers, wrong)
        if split == "train" or examples.labels.any():
            parts[split] = examples
            problems += wrong
    labels, before = list(numbers), sum(map(len, parts.values()))
    contradictions: tuple[str, ...] = ()
    if config.modality == "text":
        parts, contradictions = _each_once(parts, digests, labels)
    dropped = before - sum(map(len, parts.values()))
    names = config.labels or tuple(getattr(sources["train"].features[config.label_column], "names", None) or ())
    names = names or tuple(sorted((labels[i] for i in np.unique(parts["train"].labels) if i), key=by_value))
    classes = np.array([names.index(label) if label in names else -1 for label in labels])
    strangers = [
        (_place(split, part, row), labels[part.labels[row]])
        for split, part in parts.items() for row in np.flatnonzero((classes[part.labels] < 0) & (part.labels > 0))
    ]  # fmt: skip
    refuse(config.path, problems, strangers, names)
    parts = {split: replace(part, labels=classes[part.labels]) for split, part in parts.items()}
    licence = sources["train"].info.license or "see where they come from"
    return DataSet(
        splits=completed(parts, config),
        label_names=names,
        origin=f"{config.modality}s that the package datasets reads at {config.path} "
        f"({dropped} duplicates dropped; licence: {licence})",
        duplicates=dropped if config.modality == "text" else None,
        contradictions=contradictions,
    )


def _splits(config: DataConfig) -> dict[str, Any]:
    """The splits with the columns that are needed; one alone is 'train', whatever it is called."""
    item = config.image_column or config.text_column
    wanted = [name for name in (item, config.label_column, config.rationale_column) if name]
    found = _opened(config.path)
    if len(found) == 1:
        found = {"train": next(iter(found.values()))}
    splits = {SPLIT_NAMES[name]: source for name, source in found.items() if name in SPLIT_NAMES}
    if "train" not in splits:
        raise DataError(f"{config.path} has no split 'train', but {', '.join(found)}; fix: another data.path")
    for source in splits.values():
        if absent := [name for name in wanted if name not in source.column_names]:
            raise DataError(
                f"{config.path} has no column {' and no column '.join(map(repr, absent))}; "
                f"it has: {', '.join(source.column_names)}; "
                "fix: --set data.text_column=NAME (image_column, label_column, rationale_column)"
            )
    return {name: splits[name].with_format(None).select_columns(wanted) for name in SPLITS if name in splits}


def _opened(path: str) -> Mapping[str, Any]:
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


def _read(
    config: DataConfig, split: str, source: Any, numbers: dict[str, int], problems: list[str]
) -> tuple[Examples, np.ndarray]:
    """One pass over a split: its examples, and of texts the digests, (n,) uint64.

    The labels are numbered as they are met, by ``numbers``; 0: missing. ``problems`` takes what is wrong.
    """
    rows = np.arange(len(source))
    item = config.image_column or config.text_column
    column = Column(source.select_columns([item]), item, rows)
    names = getattr(source.features[config.label_column], "names", None)  # of a ClassLabel
    labels, digests = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.uint64)
    rationales: list[CharacterSpans | None] = [None] * len(rows)
    read = source if config.modality == "text" else source.remove_columns([item])  # images are decoded once, later
    for start in range(0, len(rows), _READ_AT_ONCE):
        batch = read[start : start + _READ_AT_ONCE]
        for row, label in enumerate(batch[config.label_column], start):
            if names is not None and label is not None:
                label = names[label] if label >= 0 else None
            labels[row] = numbers.setdefault(label_in(label), len(numbers))
            if not labels[row]:
                problems.append(f"{split} row {row + 1}: the label is missing")
        for row, text in enumerate(batch.get(item, ()), start):
            if not isinstance(text, str) or not text.strip():
                problems.append(f"{split} row {row + 1}: the text is empty")
                continue
            digests[row] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
            if config.rationale_column:
                try:
                    rationales[row] = rationale_in(batch[config.rationale_column][row - start], text)
                except ValueError as error:
                    problems.append(f"{split} row {row + 1}: {error}")
    if config.modality == "image":
        return LabelledImages(column, labels), digests
    annotated = any(spans is not None for spans in rationales)
    return LabelledTexts(column, labels, rationales if annotated else None), digests


def _each_once(
    parts: dict[str, LabelledTexts], digests: dict[str, np.ndarray], labels: Sequence[str]
) -> tuple[dict[str, LabelledTexts], tuple[str, ...]]:
    """Each text once, in 'test' before 'dev' before 'train', and an entry for each that has different labels."""
    order = [split for split in reversed(SPLITS) if split in parts]
    splits = np.repeat(np.arange(len(order)), [len(parts[split]) for split in order])
    rows = np.concatenate([parts[split].texts.rows for split in order])
    given = np.concatenate([parts[split].labels for split in order])
    _, first, inverse = np.unique(
        np.concatenate([digests[split] for split in order]), return_index=True, return_inverse=True
    )
    kept = first[inverse]  # for each row, the one that stands for it

    def excerpt(number: int) -> str:
        return repr(str(parts[order[splits[number]]].texts[int(rows[number])])[:EXCERPT])

    def said(number: int) -> str:
        return f"{order[splits[number]]} row {rows[number] + 1} '{labels[given[number]]}'"

    others: dict[int, list[str]] = {}
    for number in np.flatnonzero(given != given[kept]):
        others.setdefault(int(kept[number]), []).append(said(number))
    entries = [
        f"{said(number)} (kept), {', '.join(named)}: {excerpt(number)}"
        for number, named in others.items()
    ]
    stays = kept == np.arange(len(kept))
    return {
        split: parts[split].take(rows[stays & (splits == number)]) for number, split in enumerate(order)
    }, tuple(entries)


def _place(split: str, part: Any, number: int) -> str:
    return f"{split} row {part.items.rows[number] + 1}"
