"""Recorded knowledge of a teacher, whatever it is: what it says about texts, aligned with any tokenizer by characters.

One row a text, in JSON lines or Parquet. ``text``, or ``id``, the first 16 hex digits of its SHA-256; and any of

    probabilities        {label: probability}, or a list in the order of the classes
    label, confidence    the same in short: the rest is shared by the other classes
    rationale            [[start, end], ...] or [[start, end, weight], ...], characters of the passages that decide
    quotes               those passages as written, each found at its first place
    scores               [[start, end, value], ...]: how much each passage or token is wanted, as log-odds

``rekd_train.training.teacher.write_knowledge`` packs scores into a byte each, with two for where each token lies.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rekd_train.data.examples import UNLABELLED, DataSet, LabelledTexts
from rekd_train.data.table_files import read_table
from rekd_train.errors import DataError, listed
from rekd_train.inputs.text import TextPreprocessor

_PACKED = ("packed_scores", "packed_gaps", "packed_lengths", "packed_scale")
_CONFIDENCE = 0.9
"""Of a label that is given alone."""


def text_id(text: str) -> str:
    """What a text is found by: the first 16 hex digits of the SHA-256 of its UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Statement:
    """What a teacher says about one text; None for what it does not say."""

    probabilities: np.ndarray | None
    """(C,) float32, sums to 1."""
    marks: np.ndarray | None
    """(m, 3) float32: start, end and weight of each passage that decides; empty: it says that nothing does."""
    scores: np.ndarray | None
    """(m, 3) float32: start, end and log-odds of each token, in order."""


@dataclass(frozen=True)
class Knowledge:
    """A file of statements."""

    path: Path
    statements: dict[str, Statement]
    """By ``text_id``."""
    texts: dict[str, str]
    """The texts that the file holds, by ``text_id``."""
    lost_quotes: int
    """Quotes that are not in their text; they are left out."""


def read_knowledge(path: Path, labels: Sequence[str], kind: type[Reader] | None = None) -> Knowledge:
    """Read a teacher's statements.

    Args:
        labels: class names of the data, in the order of the classes.
        kind: None: of texts (``rekd_train.data.image_knowledge.ImageReader``: of images).

    Raises:
        DataError: unreadable, unknown columns, or wrong rows, all of them in one message.
    """
    table = read_table(path)
    reader = (kind or Reader)(list(labels))
    item = reader.columns[0]
    unknown = [name for name in table.columns if name not in (*reader.columns, *(_PACKED if item == "text" else ()))]
    if unknown or not {item, "id"} & table.columns.keys():
        problem = f"unknown columns: {', '.join(unknown)}" if unknown else f"neither '{item}' nor 'id'"
        raise DataError(f"{path}: {problem}; columns: {', '.join(reader.columns)}")
    statements: dict[str, Statement] = {}
    texts: dict[str, str] = {}
    for number in range(len(next(iter(table.columns.values())))):
        row = {name: values[number] for name, values in table.columns.items() if not _absent(values[number])}
        text = row.get(item)
        key = reader.key(text) if isinstance(text, str) else row.get("id")
        if not isinstance(key, str):
            reader.mistakes.append(f"{table.line(number)}: no {item} and no id")
        elif key in statements:
            reader.mistakes.append(f"{table.line(number)}: a {item} that stands further up, too")
        else:
            statements[key] = reader.statement(row, table.line(number))
            if isinstance(row.get("text"), str):
                texts[key] = text
    if reader.mistakes:
        raise DataError(f"{path}: {listed(reader.mistakes)}")
    return Knowledge(path, statements, texts, reader.lost_quotes)


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


class Reader:
    """Rows of one file to statements; notes what is wrong with them."""

    columns = ("text", "id", "probabilities", "label", "confidence", "rationale", "quotes", "scores")
    key = staticmethod(text_id)

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels
        self.mistakes: list[str] = []
        self.lost_quotes = 0

    def statement(self, row: dict[str, Any], line: str) -> Statement:
        text = row.get(self.columns[0])
        parts: list[np.ndarray | None] = []
        for what, read in {"class": self._probabilities, "rationale": self._marks, "scores": self._scores}.items():
            try:
                parts.append(read(row, text))
            except (TypeError, ValueError, KeyError) as error:
                reason = error if type(error) is ValueError else f"{what} of another form ({error})"
                self.mistakes.append(f"{line}: {reason}")
                parts.append(None)
        return Statement(*parts)

    def _probabilities(self, row: dict[str, Any], text: str | None) -> np.ndarray | None:
        given, count = row.get("probabilities"), len(self.labels)
        if given is None and "label" not in row:
            return None
        if given is None:
            given = {str(row["label"]): float(row.get("confidence", _CONFIDENCE))}
        if isinstance(given, dict):
            given = {str(name): value for name, value in given.items() if value is not None}
            if strangers := [name for name in given if name not in self.labels]:
                raise ValueError(f"the class {strangers[0]!r} is none of {', '.join(self.labels)}")
            rest = max(0.0, 1 - sum(given.values())) / max(1, count - len(given))
            given = [given.get(name, rest) for name in self.labels]
        values = np.asarray(given, dtype=np.float32)
        if values.shape != (count,):
            raise ValueError(f"{len(given)} probabilities for {count} classes")
        if not (np.isfinite(values).all() and (values >= 0).all() and abs(values.sum() - 1) < 0.02):
            raise ValueError(f"the probabilities {list(given)} do not sum to 1")
        return values / values.sum()

    def _marks(self, row: dict[str, Any], text: str | None) -> np.ndarray | None:
        passages = [(*passage, 1.0)[:3] for passage in row["rationale"]] if "rationale" in row else None
        if "quotes" in row:
            if text is None:
                raise ValueError("quotes need the text beside them, not its id alone")
            if not isinstance(row["quotes"], list) or not all(isinstance(quote, str) for quote in row["quotes"]):
                raise ValueError(f"quotes are {str(row['quotes'])[:40]!r}, not a list of strings")
            passages = passages or []
            for quote in row["quotes"]:
                start = text.find(quote) if quote.strip() else -1
                if start < 0:
                    self.lost_quotes += 1
                else:
                    passages.append((start, start + len(quote), 1.0))
        return None if passages is None else _segments(passages, text, "rationale")

    def _scores(self, row: dict[str, Any], text: str | None) -> np.ndarray | None:
        if "packed_scores" in row:
            kinds = {"gaps": np.uint8, "lengths": np.uint8, "scores": np.int8}
            parts = [np.frombuffer(row.get(f"packed_{name}", b""), kind) for name, kind in kinds.items()]
            ends = np.cumsum(parts[0].astype(np.int64) + parts[1]) if len({*map(len, parts)}) == 1 else None
            scale = np.float32(row.get("packed_scale", np.nan))
            if ends is None or not np.isfinite(scale) or (text is not None and ends.max(initial=0) > len(text)):
                raise ValueError("packed scores that are damaged; fix: rekd-train record again")
            lengths, values = parts[1], parts[2] * scale
            return np.stack([ends - lengths, ends, values], axis=1).astype(np.float32)
        if "scores" not in row:
            return None
        segments = _segments(row["scores"], text, "scores")
        segments = segments[np.argsort(segments[:, 0], kind="stable")]
        if (segments[1:, 0] < segments[:-1, 1]).any():
            raise ValueError("scores of passages that overlap")
        return segments


def _segments(passages: Sequence[Sequence[float]], text: str | None, what: str) -> np.ndarray:
    segments = np.asarray(passages, dtype=np.float32).reshape(-1, 3)
    if not np.isfinite(segments).all():
        raise ValueError(f"{what} hold values that are not finite")
    for start, end, _ in segments:
        if not 0 <= start < end or (text is not None and end > len(text)):
            limit = "" if text is None else f" <= {len(text)}, the text's length"
            raise ValueError(f"{what} hold [{start:.0f}, {end:.0f}], not 0 <= start < end{limit}")
    return segments


@dataclass(frozen=True)
class AlignedKnowledge:
    """What a teacher says about the examples of a split, token by token of the student."""

    probabilities: np.ndarray
    """(n, C) float32, NaN where it says nothing."""
    scores: list[np.ndarray | None]
    """For each text (length,) float32 log-odds, NaN for tokens that it does not score; None: no scores."""
    marks: list[np.ndarray | None]
    """For each text (length,) float32 weight of the passage that a token lies in, 0 in none; None: no rationale."""

    @property
    def empty(self) -> bool:
        """Whether it says nothing at all."""
        said = any(each is not None for each in (*self.scores, *self.marks))
        return not said and bool(np.isnan(self.probabilities).all())


def with_unlabelled(data: DataSet, knowledge: Knowledge) -> DataSet:
    """The data with the texts that the file holds and no split has, behind the training examples, without labels."""
    known = {text_id(text) for split in data.splits.values() for text in split.items}
    new = [text for key, text in knowledge.texts.items() if key not in known]
    if not new:
        return data
    train = data.splits["train"]
    labels = np.concatenate([train.labels, np.full(len(new), UNLABELLED, dtype=np.int64)])
    rationales = None if train.rationales is None else [*train.rationales, *[None] * len(new)]
    return replace(data, splits=data.splits | {"train": LabelledTexts(train.texts + new, labels, rationales)})


def align(knowledge: Knowledge, texts: Sequence[str], preprocessor: TextPreprocessor, classes: int) -> AlignedKnowledge:
    """The statements about these texts, in their order."""
    nothing = Statement(None, None, None)
    probabilities = np.full((len(texts), classes), np.nan, dtype=np.float32)
    scores, marks = [], []
    for start in range(0, len(texts), 512):
        some = texts[start : start + 512]
        for index, (text, encoding) in enumerate(zip(some, preprocessor.encode(some), strict=True), start):
            said = knowledge.statements.get(text_id(text), nothing)
            if said.probabilities is not None:
                probabilities[index] = said.probabilities
            offsets = np.array(encoding.offsets, dtype=np.float32)
            scores.append(None if said.scores is None else scores_at(said.scores, offsets))
            marks.append(None if said.marks is None else marks_at(said.marks, offsets))
    return AlignedKnowledge(probabilities, scores, marks)


def scores_at(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(N,) values of the segments (m, 3), in order, under tokens (N, 2): the mean by shared characters, else NaN."""
    empty = segments[segments[:, 0] == segments[:, 1]]  # a space that a tokenizer trims away
    starts, ends, values = segments[segments[:, 0] < segments[:, 1]].T
    first, last = np.searchsorted(ends, offsets[:, 0], "right"), np.searchsorted(starts, offsets[:, 1], "left")
    found = np.full(len(offsets), np.nan, dtype=np.float32)
    one = (last - first == 1) & (offsets[:, 0] < offsets[:, 1])
    found[one] = values[first[one]]
    for token in np.flatnonzero((last - first > 1) & (offsets[:, 0] < offsets[:, 1])):
        chosen = slice(first[token], last[token])
        shared = np.minimum(ends[chosen], offsets[token, 1]) - np.maximum(starts[chosen], offsets[token, 0])
        found[token] = np.average(values[chosen], weights=shared)
    for start, end, value in empty:
        found[(offsets[:, 0] == start) & (offsets[:, 1] == end)] = value
    return found


def marks_at(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(N,) the largest weight of a passage (m, 3) that a token (N, 2) touches; 0 for none."""
    found = np.zeros(len(offsets), dtype=np.float32)
    for start, end, weight in segments:
        touched = (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 0] < offsets[:, 1])
        found[touched] = np.maximum(found[touched], weight)
    return found


def checked_statements(knowledge: Knowledge, truth: dict[str, int]) -> dict[str, Any]:
    """Counts for a reader who wants to know whether a file can teach.

    Args:
        truth: class of the data's own label, by ``text_id``.

    Returns:
        ``statements``, ``known`` (about texts of the data), and of all statements the shares with ``probabilities``,
        ``rationale`` and ``scores``; ``lost_quotes``; ``agreement`` of the most probable class with the data's labels;
        ``marked_share``, of the characters, mean over texts that the file holds.
    """
    statements = knowledge.statements
    counts = {
        "probabilities": sum(each.probabilities is not None for each in statements.values()),
        "rationale": sum(each.marks is not None for each in statements.values()),
        "scores": sum(each.scores is not None for each in statements.values()),
    }
    judged = [
        int(said.probabilities.argmax()) == truth[key]
        for key, said in statements.items() if key in truth and said.probabilities is not None
    ]
    shares = [
        float((said.marks[:, 1] - said.marks[:, 0]).sum()) / len(text)
        for key, text in knowledge.texts.items() if (said := statements[key]).marks is not None
    ]
    return {
        "statements": len(statements), "known": sum(key in truth for key in statements),
        **{name: count / len(statements) for name, count in counts.items()},
        "lost_quotes": knowledge.lost_quotes, "agreement": float(np.mean(judged)) if judged else None,
        "marked_share": float(np.mean(shares)) if shares else None,
    }  # fmt: skip

