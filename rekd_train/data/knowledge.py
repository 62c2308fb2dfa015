"""Recorded knowledge of a teacher, whatever it is: what it says about texts, by characters, or images, by pixels.

One row a text or image, in JSON lines or Parquet. ``text``, or ``id``, the first 16 hex digits of its SHA-256; for an
image ``file``, its path within the folder of images, or the ``id`` of the file (of the pixels, where there are no
files); and any of

    probabilities        {label: probability}, or a list in the order of the classes
    label, confidence    the same in short: the rest is shared by the other classes
    rationale            [[start, end], ...] or [[start, end, weight], ...], characters of the passages that decide
    quotes               those passages as written, each found at its first place
    scores               [[start, end, value], ...]: how much each passage or token is wanted, as log-odds
    boxes                [[left, top, right, bottom], ...] or with a fifth number, a weight: pixels of the upright image
    map                  [[value, ...], ...]: log-odds of a grid of any size, rows from the top

``rekd_train.training.teacher.write_knowledge`` packs scores into a byte each, with two for where each token lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rekd_train.data.examples import UNLABELLED, DataSet, LabelledTexts, later_passages, names_of, sentences, text_id
from rekd_train.data.splits import marked_patches, marks_at, on_patches, scores_at
from rekd_train.data.table_files import label_in, read_table
from rekd_train.errors import DataError, listed
from rekd_train.inputs.image import ImagePreprocessor
from rekd_train.inputs.preprocessors import Preprocessor


@dataclass(frozen=True)
class Statement:
    """What a teacher says about one text or image; None for what it does not say."""

    probabilities: np.ndarray | None  # (C,) float32, sums to 1
    marks: np.ndarray | None  # (m, 3) float32: start, end, weight of what decides, or (m, 5) of boxes; empty: nothing
    scores: np.ndarray | None  # (m, 3) float32: start, end, log-odds of tokens, in order, or a map (rows, columns)


@dataclass(frozen=True)
class Knowledge:
    """A file of statements."""

    path: Path
    statements: dict[str, Statement]  # by one of the ``names_of`` a text or image
    texts: dict[str, str]  # the texts that the file holds, by ``text_id``
    lost_quotes: int  # quotes that are not in their text; they are left out


def read_knowledge(path: Path, labels: Sequence[str], modality: str = "text") -> Knowledge:
    """What a teacher says about data with these class names; DataError: unreadable, or wrong, every row named."""
    table = read_table(path)
    reader = (_ImageReader if modality == "image" else _Reader)(list(labels))
    item = reader.columns[0]
    packed = ("packed_scores", "packed_gaps", "packed_lengths", "packed_scale") if item == "text" else ()
    unknown = [name for name in table.columns if name not in (*reader.columns, *packed)]
    if unknown or not {item, "id"} & table.columns.keys():
        problem = f"unknown columns: {', '.join(unknown)}" if unknown else f"neither '{item}' nor 'id'"
        raise DataError(f"{path}: {problem}; columns: {', '.join(reader.columns)}")
    statements: dict[str, Statement] = {}
    texts: dict[str, str] = {}
    for number, values in enumerate(zip(*table.columns.values(), strict=True)):
        cells, line = zip(table.columns, values, strict=True), table.line(number)
        row = {name: value for name, value in cells if value is not None and value == value}  # nor NaN
        text = row.get(item)
        key = reader.key(text) if isinstance(text, str) and text.strip() else row.get("id")
        if not isinstance(key, str):
            reader.mistakes.append(f"{line}: no {item} and no id")
        elif key in statements:
            reader.mistakes.append(f"{line}: a {item} that stands further up, too")
        else:
            statements[key] = reader.statement(row, line)
            if isinstance(row.get("text"), str) and text.strip():
                texts[key] = text
    if reader.mistakes:
        raise DataError(f"{path}: {listed(reader.mistakes)}; fix: correct these rows or take them out")
    return Knowledge(path, statements, texts, reader.lost_quotes)


class _Reader:
    """Rows of one file to statements; notes what is wrong with them."""

    columns = ("text", "id", "probabilities", "label", "confidence", "rationale", "quotes", "scores")
    key = staticmethod(text_id)

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels
        self.mistakes: list[str] = []
        self.lost_quotes = 0

    def statement(self, row: dict[str, Any], line: str) -> Statement:
        parts: list[np.ndarray | None] = []
        names = "class", self.columns[5], self.columns[-1]
        for what, read in zip(names, (self._probabilities, self._marks, self._scores), strict=True):
            try:
                parts.append(read(row, row.get(self.columns[0])))
            except (DataError, TypeError, ValueError, KeyError) as error:
                reason = error if isinstance(error, DataError) else f"{what} of another form ({error})"
                self.mistakes.append(f"{line}: {reason}")
                parts.append(None)
        return Statement(*parts)

    def _probabilities(self, row: dict[str, Any], text: str | None) -> np.ndarray | None:
        given, count = row.get("probabilities"), len(self.labels)
        if given is None and "label" in row:
            given = {label_in(row["label"]): float(row.get("confidence", 0.9))}  # 0.9: a label alone is no certainty
        if given is None:
            return None
        if isinstance(given, dict):
            given = {str(name): value for name, value in given.items() if value is not None}
            if strangers := [name for name in given if name not in self.labels]:
                raise DataError(f"the class {strangers[0]!r} is none of {', '.join(self.labels)}")
            rest = max(0.0, 1 - sum(given.values())) / max(1, count - len(given))
            given = [given.get(name, rest) for name in self.labels]
        values = np.asarray(given, dtype=np.float32)
        if values.shape != (count,):
            raise DataError(f"{len(given)} probabilities for {count} classes")
        if not (np.isfinite(values).all() and (values >= 0).all() and abs(values.sum() - 1) < 0.02):
            raise DataError(f"the probabilities {list(given)} do not sum to 1")
        return values / values.sum()

    def _marks(self, row: dict[str, Any], text: str | None) -> np.ndarray | None:
        passages = [(*passage, 1.0)[:3] for passage in row["rationale"]] if "rationale" in row else None
        if "quotes" in row:
            if text is None:
                raise DataError("quotes need the text beside them, not its id alone")
            if not isinstance(row["quotes"], list) or not all(isinstance(quote, str) for quote in row["quotes"]):
                raise DataError(f"quotes are {str(row['quotes'])[:40]!r}, not a list of strings")
            starts = [text.find(quote) if quote.strip() else -1 for quote in row["quotes"]]
            self.lost_quotes += starts.count(-1)
            found = [(at, at + len(quote), 1.0) for at, quote in zip(starts, row["quotes"], strict=True) if at >= 0]
            if found or not starts:  # that none is in the text does not say that nothing decides
                passages = [*(passages or []), *found]
        return None if passages is None else _segments(passages, text, "rationale")

    def _scores(self, row: dict[str, Any], text: str | None) -> np.ndarray | None:
        if "packed_scores" in row:
            kinds = {"gaps": np.uint8, "lengths": np.uint8, "scores": np.int8}
            parts = [np.frombuffer(row.get(f"packed_{name}", b""), kind) for name, kind in kinds.items()]
            ends = np.cumsum(parts[0].astype(np.int64) + parts[1]) if len({*map(len, parts)}) == 1 else None
            scale = np.float32(row.get("packed_scale", np.nan))
            if ends is None or not np.isfinite(scale) or (text is not None and ends.max(initial=0) > len(text)):
                raise DataError("packed scores that are damaged: rekd-train record writes them again")
            lengths, values = parts[1], parts[2] * scale
            return np.stack([ends - lengths, ends, values], axis=1).astype(np.float32)
        if "scores" not in row:
            return None
        segments = _segments(row["scores"], text, "scores")
        segments = segments[np.argsort(segments[:, 0], kind="stable")]
        if (segments[1:, 0] < segments[:-1, 1]).any():
            raise DataError("scores of passages that overlap")
        return segments


def _segments(passages: Sequence[Sequence[float]], text: str | None, what: str) -> np.ndarray:
    segments = np.asarray(passages, dtype=np.float32).reshape(-1, 3)
    if not np.isfinite(segments).all():
        raise DataError(f"{what} hold values that are not finite")
    for start, end, _ in segments:
        if not 0 <= start < end or (text is not None and end > len(text)):
            limit = "" if text is None else f" <= {len(text)}, the text's length"
            raise DataError(f"{what} hold [{start:.0f}, {end:.0f}], not 0 <= start < end{limit}")
    return segments


class _ImageReader(_Reader):
    """Rows about images."""

    columns = ("file", "id", "probabilities", "label", "confidence", "boxes", "map")
    key = staticmethod(lambda file: str(PurePosixPath(file)))

    def _marks(self, row: dict[str, Any], _file: str | None) -> np.ndarray | None:
        if "boxes" not in row:
            return None
        if wrong := [box for box in row["boxes"] if len(box) not in (4, 5)]:
            raise DataError(f"boxes hold {list(wrong[0])}, not left, top, right, bottom, and a weight where wanted")
        boxes = np.array([(*box, 1.0)[:5] for box in row["boxes"]], dtype=np.float32).reshape(-1, 5)
        for left, top, right, bottom, weight in boxes:
            if not (0 <= left < right < np.inf and 0 <= top < bottom < np.inf and 0 <= weight < np.inf):
                sides = f"[{left:g}, {top:g}, {right:g}, {bottom:g}]"
                raise DataError(f"boxes hold {sides}, not 0 <= left < right, 0 <= top < bottom, or a wrong weight")
        return boxes

    def _scores(self, row: dict[str, Any], _file: str | None) -> np.ndarray | None:
        if "map" not in row:
            return None
        try:
            grid = np.array([list(values) for values in row["map"]], dtype=np.float32)
        except (TypeError, ValueError):
            grid = np.zeros(0)
        if grid.ndim != 2 or 0 in grid.shape or not np.isfinite(grid).all():
            raise DataError("the map is no grid of finite numbers")
        return grid


@dataclass(frozen=True)
class AlignedKnowledge:
    """What a teacher says about the examples of a split, token by token of the student."""

    probabilities: np.ndarray  # (n, C) float32, NaN where it says nothing
    scores: list[np.ndarray | None]  # for each text (length,) float32 log-odds, NaN where it says none; None: no scores
    marks: list[np.ndarray | None]  # for each text (length,) float32: weight of a token's passage; None: no rationale

    @property
    def empty(self) -> bool:
        """Whether it says nothing at all."""
        return bool(np.isnan(self.probabilities).all()) and all(each is None for each in (*self.scores, *self.marks))


def with_unlabelled(data: DataSet, knowledge: Knowledge) -> DataSet:
    """The data with more to train on, without labels: texts that the file holds and no split has, and parts of texts.

    Those sentences and later passages of the training texts about which the file says something, by their ids alone.
    """
    train = data.splits["train"]
    if not isinstance(train, LabelledTexts):
        return data
    known = {text_id(text) for split in data.splits.values() for text in split.items}
    new = {key: text for key, text in knowledge.texts.items() if key not in known}
    if others := knowledge.statements.keys() - known - new.keys():
        parts = (part for text in train.texts for part in (*sentences(text), *later_passages(text)))
        new |= {key: part for key, part in ((text_id(part), part) for part in parts) if key in others}
    if not new:
        return data
    labels = np.concatenate([train.labels, np.full(len(new), UNLABELLED, dtype=np.int64)])
    rationales = None if train.rationales is None else [*train.rationales, *[None] * len(new)]
    texts = train.texts + [*new.values()]
    return replace(data, splits=data.splits | {"train": LabelledTexts(texts, labels, rationales)})


def align(knowledge: Knowledge, items: Sequence[Any], preprocessor: Preprocessor, classes: int,
          folder: Path = Path()) -> AlignedKnowledge:
    """The statements about these texts, or images of a folder, in order; DataError names boxes that leave an image."""
    images = isinstance(preprocessor, ImagePreprocessor)
    probabilities = np.full((len(items), classes), np.nan, dtype=np.float32)
    scores, marks, wrong = [None] * len(items), [None] * len(items), []
    for start in range(0, len(items), 512):
        some = items[start : start + 512]
        encodings = [None] * len(some) if images else preprocessor.encode(some)
        for index, (item, encoding) in enumerate(zip(some, encodings, strict=True), start):
            name = next((name for name in names_of(item, folder) if name in knowledge.statements), None)
            if name is None:
                continue
            said = knowledge.statements[name]
            if said.probabilities is not None:
                probabilities[index] = said.probabilities
            if images:
                grid = preprocessor.settings.rows, preprocessor.settings.columns
                scores[index] = None if said.scores is None else on_patches(said.scores, *grid)
                if said.marks is not None:
                    width, height = preprocessor([item]).sizes[0]
                    if (said.marks[:, 2:4] > (width, height)).any():
                        wrong.append(f"{name}: a box leaves the image, which has {width} x {height} pixels")
                    parts = said.marks / np.float32([width, height, width, height, 1])
                    marks[index] = marked_patches(parts, *grid)
            else:
                offsets = np.array(encoding.offsets, dtype=np.float32)
                scores[index] = None if said.scores is None else scores_at(said.scores, offsets)
                marks[index] = None if said.marks is None else marks_at(said.marks, offsets)
    if wrong:
        raise DataError(f"{knowledge.path}: {listed(wrong)}; fix: left, top, right, bottom in pixels of the image")
    return AlignedKnowledge(probabilities, scores, marks)


def checked_statements(knowledge: Knowledge, truth: dict[str, int]) -> dict[str, Any]:
    """Counts for a reader who wants to know whether a file can teach; ``truth``: classes of the data by ``names_of``.

    ``statements``, ``known`` (about the data), and of all statements the shares with ``probabilities``, ``rationale``
    and ``scores``; ``lost_quotes``; ``agreement`` of the most probable class with the data's labels; ``marked_share``,
    of the characters, mean over texts that the file holds.
    """
    said = knowledge.statements
    parts = {"probabilities": "probabilities", "rationale": "marks", "scores": "scores"}
    judged = [int(each.probabilities.argmax()) == truth[name]
              for name, each in said.items()
              if truth.get(name, UNLABELLED) != UNLABELLED and each.probabilities is not None]
    marked = [float((said[name].marks[:, 1] - said[name].marks[:, 0]).sum()) / len(text)
              for name, text in knowledge.texts.items() if said[name].marks is not None]
    return {
        "statements": len(said), "known": sum(name in truth for name in said),
        **{name: float(np.mean([getattr(each, part) is not None for each in said.values()]))
           for name, part in parts.items()},
        "lost_quotes": knowledge.lost_quotes, "agreement": float(np.mean(judged)) if judged else None,
        "marked_share": float(np.mean(marked)) if marked else None,
    }  # fmt: skip
