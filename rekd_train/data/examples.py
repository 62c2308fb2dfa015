"""Labelled examples, and what every source does with them: number classes, drop duplicates, split, check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from rekd_train.errors import DataError

SPLITS = ("train", "dev", "test")

CharacterSpans = list[tuple[int, int]]
"""First character and one past the last of each passage that a person named as the reason."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of one split."""

    texts: list[str]
    labels: np.ndarray
    """(n,) int64."""
    rationales: list[CharacterSpans | None] | None = field(default=None, repr=False)
    """Human rationales; None for a text nobody annotated, None altogether where the data have none."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | np.ndarray) -> LabelledTexts:
        """These examples, in this order."""
        rationales = None if self.rationales is None else [self.rationales[i] for i in indices]
        return LabelledTexts([self.texts[i] for i in indices], self.labels[indices], rationales)

    def head(self, count: int | None) -> LabelledTexts:
        """The first ``count`` examples; None: all."""
        return self if count is None else self.take(np.arange(min(count, len(self))))


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split."""

    images: np.ndarray | list[Path] = field(repr=False)
    """uint8 (n, height, width, channels), or image files of any size."""
    labels: np.ndarray
    """(n,) int64."""
    regions: np.ndarray | None = field(default=None, repr=False)
    """(n, 4) int64: top, left, bottom, right in pixels of the part that decides the label, where it is known."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int] | np.ndarray) -> LabelledImages:
        """These examples, in this order."""
        chosen = self.images[indices] if isinstance(self.images, np.ndarray) else [self.images[i] for i in indices]
        return LabelledImages(chosen, self.labels[indices], None if self.regions is None else self.regions[indices])

    def head(self, count: int | None) -> LabelledImages:
        """The first ``count`` examples; None: all."""
        return self if count is None else self.take(np.arange(min(count, len(self))))


Examples = LabelledTexts | LabelledImages
SomeExamples = TypeVar("SomeExamples", LabelledTexts, LabelledImages)


@dataclass(frozen=True)
class DataSet:
    """Named splits of labelled examples."""

    splits: dict[str, Examples]
    """'train', 'dev' and 'test'."""
    label_names: tuple[str, ...]
    """Class names, in the order of the labels."""
    origin: str
    """Where the data come from, under which terms, and what was done to them, for the model card."""
    duplicates: int | None = None
    """Examples left out since they occur twice; None: nobody has looked."""
    contradictions: tuple[str, ...] = ()
    """Examples that occur with different labels; see ``rekd_train.data.examples``."""

    def limited(self, counts: dict[str, int | None]) -> DataSet:
        """The first examples of each split: ``counts`` by name of the split, None for all."""
        return replace(self, splits={name: part.head(counts.get(name)) for name, part in self.splits.items()})


def class_names(labels: Mapping[str, Sequence[str]], given: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of a data set: those given, or the training labels, sorted (whole numbers by value)."""
    return tuple(given) or tuple(sorted({label for label in labels["train"] if label}, key=_by_value))


def unknown_labels(labels: Sequence[str], names: Sequence[str], place: Callable[[int], str]) -> list[str]:
    """One problem for each label that is none of the classes; '' (missing) is left to others.

    Args:
        place: where the label of an index stands.
    """
    known = set(names)
    return [
        f"{place(index)}: the label '{label}' is none of the {len(known)} classes"
        for index, label in enumerate(labels) if label and label not in known
    ]  # fmt: skip


def label_fix(names: Sequence[str]) -> str:
    """The end of a message about unknown labels."""
    some = ", ".join(list(names)[:12]) + (", ..." if len(names) > 12 else "")
    return f"classes: {some}; fix: correct the labels, or list every class: --set 'data.labels=[\"a\", \"b\"]'"


def class_numbers(labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """(n,) int64 indices into ``names``, each label being one of them."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[label] for label in labels], dtype=np.int64)


def _by_value(label: str) -> tuple[float, str]:
    whole = label.removeprefix("-").isdecimal()
    return (float(label) if whole else float("inf"), label)


@dataclass(frozen=True)
class Duplicates:
    """What was found among the examples of all splits."""

    kept: dict[str, list[int]]
    """By split, the rows to keep, in their order."""
    dropped: int
    contradictions: tuple[str, ...]
    """One entry for each example that occurs with different labels: its places and labels, the kept one first."""


def find_duplicates(
    keys: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence[str]],
    place: Callable[[str, int], str],
    shown: Callable[[str], str] = lambda key: "",
) -> Duplicates:
    """Keep each example once: in 'test' before 'dev' before 'train', and within a split the first one.

    Args:
        keys: by split, what tells examples apart: a text, or the digest of an image.
        labels: by split, as many.
        place: where the row of a split stands, for messages.
        shown: what messages say of a key.
    """
    first: dict[str, tuple[str, int]] = {}
    others: dict[str, list[tuple[str, int]]] = {}
    kept: dict[str, list[int]] = {}
    for split in (name for name in reversed(SPLITS) if name in keys):
        kept[split] = []
        for row, key in enumerate(keys[split]):
            where = first.setdefault(key, (split, row))
            if where == (split, row):
                kept[split].append(row)
            elif labels[split][row] != labels[where[0]][where[1]]:
                others.setdefault(key, []).append((split, row))
    contradictions = []
    for key, places in others.items():
        named = [f"{place(*where)} '{labels[where[0]][where[1]]}'" for where in (first[key], *places)]
        contradictions.append(f"{named[0]} (kept), {', '.join(named[1:])}{shown(key)}")
    dropped = sum(map(len, keys.values())) - sum(map(len, kept.values()))
    return Duplicates(kept, dropped, tuple(contradictions))


def stratified_split(examples: SomeExamples, shares: Sequence[float], seed: int) -> list[SomeExamples]:
    """Split so that every part has each label in the same proportion; shares sum to 1.

    Within a part the order is random, fixed by the seed.
    """
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(examples.labels):
        members = generator.permutation(np.flatnonzero(examples.labels == label))
        edges = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, chosen in zip(parts, np.split(members, edges), strict=True):
            part.append(chosen)
    orders = [generator.permutation(np.concatenate(part)) for part in parts]
    return [examples.take(order) for order in orders]


def completed(
    splits: Mapping[str, SomeExamples], dev_share: float, test_share: float, seed: int
) -> dict[str, SomeExamples]:
    """All three splits: what a source does not bring is taken out of its training examples, stratified.

    Args:
        splits: 'train' and, where the source has them, 'dev' and 'test'; those keep their examples, in an
            order that is random and always the same, so that the first of them are a fair sample.
        dev_share: share of the training examples that becomes 'dev', if there is none.
        test_share: share of the training examples that becomes 'test', if there is none.
        seed: of the split.
    """
    shares = {"dev": dev_share, "test": test_share}
    missing = [name for name in SPLITS[1:] if name not in splits]
    taken = [shares[name] for name in missing]
    parts: list[Examples] = stratified_split(splits["train"], [1 - sum(taken), *taken], seed)
    whole = {name: stratified_split(examples, [1.0], seed=0)[0] for name, examples in splits.items()}
    whole |= dict(zip(["train", *missing], parts, strict=True))
    return {name: whole[name] for name in SPLITS}


def check_data(data: DataSet, name: str) -> None:
    """Raise DataError that names every mistake: an empty split, one class only, labels beyond the classes.

    The splits may be encoded ones, too: their labels alone are looked at.
    """
    mistakes = []
    for split, examples in data.splits.items():
        if len(examples) == 0:
            mistakes.append(f"the split '{split}' is empty; fix: more examples")
            continue
        if len(examples) != len(examples.labels):
            counts = f"{len(examples)} examples and {len(examples.labels)} labels"
            mistakes.append(f"the split '{split}' has {counts}; fix: one label for each")
            continue
        low, high = int(examples.labels.min()), int(examples.labels.max())
        if low < 0 or high >= len(data.label_names):
            wrong = low if low < 0 else high
            mistakes.append(
                f"the split '{split}' has the label {wrong}; there are {len(data.label_names)} classes, "
                f"0 to {len(data.label_names) - 1}; fix: labels and class names that belong together"
            )
    if len(data.label_names) < 2 or len(np.unique(data.splits["train"].labels)) < 2:
        mistakes.append("the training examples are all of one class; fix: examples of at least two")
    if mistakes:
        raise DataError(f"data '{name}': " + "; ".join(mistakes))
