"""Raw labelled examples, as a source delivers them: texts or images; split, checked before they are used, summed up."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.errors import DataError

if TYPE_CHECKING:
    from rekd_train.data.splits import Split

SPLITS = ("train", "dev", "test")
UNLABELLED = -1  # the label of a training example that has none and is learned from a teacher alone
SHOWN = 20  # contradictions that a summary lists, and classes that its table shows
_SENTENCE = re.compile(r"[^.!?<>]+[.!?]*")  # tags such as <br /> end one, too
_PASSAGE = 180  # words of a passage: about 256 tokens
_UNEVEN = 10  # a class with so many times the examples of another one makes accuracy blind for that one

CharacterSpans = list[tuple[int, int]]  # first character and one past the last of what a person named as the reason


class _OneSplit:
    @property
    def items(self) -> Any:
        """The texts or images, which are the first field."""
        return next(iter(vars(self).values()))

    def __len__(self) -> int:
        return len(self.items)

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """These examples, in this order; of lists lists, what takes an array of indices (a column) of its own kind."""
        at = np.asarray(indices)
        parts = ([part[i] for i in indices] if isinstance(part, list) else part for part in vars(self).values())
        return type(self)(*(part if part is None or isinstance(part, list) else part[at] for part in parts))

    def head(self, count: int | None) -> Self:
        """The first ``count`` examples; None: all."""
        return self if count is None else self.take(np.arange(min(count, len(self))))

    def unlabelled_from(self, count: int) -> Self:
        """The same examples; only the first ``count`` keep their label."""
        return replace(self, labels=np.where(np.arange(len(self)) < count, self.labels, UNLABELLED))

    def labelled(self) -> Self:
        """The examples that have a label."""
        known = self.labels != UNLABELLED
        return self if known.all() else self.take(np.flatnonzero(known))


@dataclass(frozen=True)
class LabelledTexts(_OneSplit):
    """Texts of one split."""

    texts: Sequence[str]  # a list, or a ``rekd_train.data.table_files.Column``, which is read when it is asked for
    labels: np.ndarray  # (n,) int64
    rationales: list[CharacterSpans | None] | None = field(default=None, repr=False)
    """Human rationales; None for a text nobody annotated, None altogether where these have none."""

    def __post_init__(self) -> None:
        if self.rationales is not None and all(spans is None for spans in self.rationales):
            object.__setattr__(self, "rationales", None)


@dataclass(frozen=True)
class LabelledImages(_OneSplit):
    """Images of one split."""

    images: np.ndarray | Sequence[Any] = field(repr=False)  # uint8 (n, height, width, channels), or files or Pillow's
    labels: np.ndarray  # (n,) int64
    regions: np.ndarray | None = field(default=None, repr=False)
    """(n, 4) int64: top, left, bottom, right in pixels of the part that decides the label, where it is known."""


Examples = LabelledTexts | LabelledImages
SomeExamples = TypeVar("SomeExamples", LabelledTexts, LabelledImages)


@dataclass(frozen=True)
class DataSet:
    """Named splits of labelled examples."""

    splits: dict[str, Examples]  # 'train', 'dev' and 'test'
    label_names: tuple[str, ...]  # class names, in the order of the labels
    origin: str  # where the data come from, under which terms, and what was done to them, for the model card
    duplicates: int | None = None  # examples left out since they occur twice; None: nobody has looked
    contradictions: tuple[str, ...] = ()  # of examples with different labels: places and labels, the kept one first


def text_id(text: str) -> str:
    """What a text is found by: the first 16 hex digits of the SHA-256 of its UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sentences(text: str) -> list[str]:
    """The sentences of 4 to 20 words, each once: short texts to learn from, of which long ones are made."""
    found = (" ".join(sentence.split()) for sentence in _SENTENCE.findall(text))
    return list(dict.fromkeys(each for each in found if 4 <= len(each.split()) <= 20))


def some_sentences(texts: Iterable[str], count: int) -> list[str]:
    """At most ``count`` sentences of each text, at random but always the same ones, none twice."""
    chosen = (sentence for text in texts for sentence in sorted(sentences(text), key=text_id)[:count])
    return list(dict.fromkeys(chosen))


def later_passages(text: str) -> list[str]:
    """What follows a text's first 180 words, in passages of 40 to 180: models of 256 tokens never read it."""
    words = text.split()
    parts = (words[start : start + _PASSAGE] for start in range(_PASSAGE, len(words), _PASSAGE))
    return [" ".join(part) for part in parts if len(part) >= 40]


def names_of(item: Any, folder: Path) -> tuple[str, ...]:
    """What a file may call a text or an image: of an image file its path within ``folder`` first, then the id."""
    if isinstance(item, str):
        return (text_id(item),)
    if isinstance(item, Path):
        path = item.relative_to(folder) if item.is_relative_to(folder) else item
        return path.as_posix(), hashlib.sha256(item.read_bytes()).hexdigest()[:16]
    return (hashlib.sha256(np.ascontiguousarray(item).tobytes()).hexdigest()[:16],)


def stratified_split(examples: SomeExamples, shares: Sequence[float], seed: int) -> list[SomeExamples]:
    """Parts, by shares that sum to 1, with each label in the same proportion; their order is random, by the seed."""
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(examples.labels):
        members = generator.permutation(np.flatnonzero(examples.labels == label))
        edges = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, chosen in zip(parts, np.split(members, edges), strict=True):
            part.append(chosen)
    orders = [generator.permutation(np.concatenate(part)) for part in parts]
    return [examples.take(order) for order in orders]


def completed(splits: Mapping[str, SomeExamples], config: DataConfig) -> dict[str, SomeExamples]:
    """All three splits: of 'dev' and 'test', what a source does not bring is taken out of 'train', stratified.

    What it brings is put in an order that is random and always the same: the first examples are a fair sample.
    """
    shares = {"dev": config.dev_share, "test": config.test_share}
    missing = {name: share for name, share in shares.items() if name not in splits}
    parts = stratified_split(splits["train"], [1 - sum(missing.values()), *missing.values()], config.seed)
    whole = {name: stratified_split(examples, [1.0], seed=0)[0] for name, examples in splits.items()}
    whole |= dict(zip(["train", *missing], parts, strict=True))
    return {name: whole[name] for name in SPLITS}


def check_data(data: DataSet, name: str) -> None:
    """Raise DataError that names every mistake: an empty split, labels beyond the classes, one class only."""
    mistakes, classes = [], len(data.label_names)
    for split, examples in data.splits.items():
        known_labels = {*range(classes), *([UNLABELLED] if split == "train" else [])}
        strangers = [label for label in np.unique(examples.labels) if label not in known_labels]
        if len(examples) == 0:
            mistakes.append(f"the split '{split}' is empty; fix: more examples")
        elif len(examples) != len(examples.labels):
            mistakes.append(f"the split '{split}' has {len(examples)} examples and {len(examples.labels)} labels; "
                            "fix: one label for each")
        elif strangers:
            mistakes.append(f"the split '{split}' has the label {strangers[0]}; there are {classes} classes, 0 to "
                            f"{classes - 1}; fix: labels of these")
    if len({*np.unique(data.splits["train"].labels)} - {UNLABELLED}) < 2:
        mistakes.append("the training examples are all of one class; fix: examples of at least two")
    if mistakes:
        raise DataError(f"data '{name}': " + "; ".join(mistakes))


def summarise(data: DataSet, splits: Mapping[str, Split]) -> dict[str, Any]:
    """JSON values: by split ``examples``, ``classes`` (examples of each), for texts ``tokens`` and ``cut``; and more.

    ``tokens`` are those of the whole texts (p5, p50, p95, max), specials included; ``cut`` counts the texts that are
    longer than ``max_length``. ``duplicates_dropped`` is None where nobody has looked for any.
    """
    summary: dict[str, Any] = {"splits": {}}
    for name, split in splits.items():
        labels = split.labels[split.labels != UNLABELLED]
        counts = np.bincount(labels, minlength=len(data.label_names)).tolist()
        found = {"examples": len(split), "classes": dict(zip(data.label_names, counts, strict=True))}
        if split.whole_lengths is not None:
            low, middle, high = np.percentile(split.whole_lengths, (5, 50, 95)).astype(int).tolist()
            found["tokens"] = {"p5": low, "p50": middle, "p95": high, "max": int(split.whole_lengths.max())}
            found["cut"] = int((split.whole_lengths > split.lengths).sum())
            summary["max_length"] = split.preprocessor.positions
        if len(labels) < len(split):
            found["unlabelled"] = len(split) - len(labels)
        summary["splits"][name] = found
    shown = list(data.contradictions[:SHOWN])
    contradicting = {"contradicting": len(data.contradictions), "contradictions": shown}
    return summary | {"duplicates_dropped": data.duplicates} | contradicting


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table: what is counted, and its figure in each split."""
    splits = list(summary["splits"].values())
    names = list(splits[0]["classes"])
    shown = names if len(names) <= SHOWN else names[: SHOWN - 1]
    rows = [("examples", *(f"{split['examples']:,}" for split in splits))]
    rows += [(f"class {name}", *(_part(split["classes"][name], split) for split in splits)) for name in shown]
    if len(shown) < len(names):
        rest = [sum(split["classes"][name] for name in names[len(shown) :]) for split in splits]
        rows.append((f"{len(names) - len(shown)} more classes", *map(_part, rest, splits)))
    if "max_length" in summary:
        for key, title in (("p5", "5th percentile"), ("p50", "median"), ("p95", "95th percentile"), ("max", "most")):
            rows.append((f"tokens, {title}", *(f"{split['tokens'][key]:,}" for split in splits)))
        rows.append((f"cut at {summary['max_length']} tokens", *(_part(split["cut"], split) for split in splits)))
    return rows


def summary_notes(summary: dict[str, Any]) -> list[str]:
    """What a table cannot show, a line each."""
    notes = []
    if summary["duplicates_dropped"] is not None:
        notes.append(f"duplicates dropped: {summary['duplicates_dropped']:,}")
        notes.append(f"examples with contradicting labels: {summary['contradicting']:,}")
        notes += [f"  {contradiction}" for contradiction in summary["contradictions"]]
        more = summary["contradicting"] - len(summary["contradictions"])
        notes += [f"  and {more:,} more"] if more else []
    counts = summary["splits"]["train"]["classes"]
    rare, common = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[common] >= _UNEVEN * counts[rare]:
        notes.append(f"uneven classes: {counts[common]:,} training examples of '{common}', {counts[rare]:,} of "
                     f"'{rare}'; see data.class_weights and stages.best_metric")
    return notes


def _part(count: int, split: dict[str, Any]) -> str:
    return f"{count:,} ({count / split['examples']:.1%})"
