"""Examples as features whose content can be exchanged: words by position, patches by place. torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rekd_train.inputs.image import ImagePreprocessor
from rekd_train.inputs.text import TextPreprocessor

if TYPE_CHECKING:
    from rekd_train.data import Split
    from rekd_train.inputs.preprocessors import Preprocessor

BATCH = 32

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Features:
    """n examples with N positions each; immutable, every change gives another one."""

    content: np.ndarray
    """Texts: (n, N) int64 token ids. Images: (n, N, height, width, channels) uint8 patches; where the grid does not
    divide the image, (n, height, width, channels) uint8 pixels."""
    selectable: np.ndarray
    """(n, N) bool: words, no special token and no padding; patches: all."""
    lengths: np.ndarray
    """(n,) int64: positions of each, specials included."""
    preprocessor: Preprocessor
    full_width: bool = False
    """Texts are padded to the model's limit: for rules by which padding may be selected."""

    def __len__(self) -> int:
        return len(self.content)

    @property
    def separable(self) -> bool:
        """Whether the content of one feature can be changed and no other's."""
        return self.content.ndim != 4

    @property
    def counts(self) -> np.ndarray:
        """(n,) int64: selectable features."""
        return self.selectable.sum(axis=1)

    def take(self, rows: np.ndarray) -> Features:
        """These examples, in this order."""
        parts = {name: getattr(self, name)[rows] for name in ("content", "selectable", "lengths")}
        return replace(self, **parts)

    def with_content(self, content: np.ndarray) -> Features:
        """The same examples with other content; lengths and what is selectable stay."""
        return replace(self, content=content)

    def without(self, mask: np.ndarray) -> Features:
        """The examples with some features (n, N) bool taken out of the input itself.

        Words are deleted and the rest closes up, as ERASER takes a rationale out of a document; patches become
        neutral, for an image has no place without pixels.
        """
        if not isinstance(self.preprocessor, TextPreprocessor):
            content = self.content.copy()
            content[mask] = self.neutral_content()
            return self.with_content(content)
        ids = [row[:length][~gone[:length]] for row, length, gone in zip(self.content, self.lengths, mask, strict=True)]
        return _texts(ids, self.preprocessor, self.full_width)

    def neutral(self) -> Features:
        """The same examples with the same content in every selectable feature."""
        content = self.content.copy()
        content[self.selectable] = self.neutral_content()
        return self.with_content(content)

    def neutral_content(self) -> int | np.ndarray:
        """The id of [MASK], else [UNK]; the mean colour of these images."""
        if isinstance(self.preprocessor, TextPreprocessor):
            return _neutral_id(self.preprocessor)
        return np.round(self.content.mean(axis=tuple(range(self.content.ndim - 1)))).astype(np.uint8)

    def batches(self, size: int = BATCH) -> Iterator[tuple[np.ndarray, Arrays]]:
        """Indices and inputs of batches of similar length, as they are served; the same ones at every call."""
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows, self._inputs(rows)

    def _inputs(self, rows: np.ndarray) -> Arrays:
        if isinstance(self.preprocessor, TextPreprocessor):
            sizes = self.preprocessor
            width = sizes.positions if self.full_width else sizes.bucket(int(self.lengths[rows].max()))
            ids = self.content[rows, :width]
            return {"input_ids": ids, "attention_mask": (np.arange(width) < self.lengths[rows, None]).astype(np.int64)}
        pixels = self.content[rows]
        if self.separable:
            settings = self.preprocessor.settings
            shape = (len(rows), settings.height, settings.width, settings.channels)
            grid = pixels.reshape(len(rows), settings.rows, settings.columns, *pixels.shape[2:])
            pixels = np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4, 5).reshape(shape))
        return {"pixels": pixels}


def features_of(split: Split, preprocessor: Preprocessor, *, full_width: bool = False) -> Features:
    """The features of a split.

    Args:
        preprocessor: of the served model.
        full_width: see ``Features``.
    """
    if isinstance(preprocessor, TextPreprocessor):
        rows = [split.inputs([index])["input_ids"][0] for index in range(len(split))]
        return _texts(rows, preprocessor, full_width)
    if not isinstance(preprocessor, ImagePreprocessor):
        raise TypeError(f"no features of {type(preprocessor).__name__}")
    pixels = split.inputs(np.arange(len(split)))["pixels"]
    settings = preprocessor.settings
    shape = (len(pixels), preprocessor.positions)
    content = pixels
    if settings.height % settings.rows == 0 and settings.width % settings.columns == 0:
        high, wide = settings.height // settings.rows, settings.width // settings.columns
        cut = pixels.reshape(len(pixels), settings.rows, high, settings.columns, wide, settings.channels)
        content = np.ascontiguousarray(cut.transpose(0, 1, 3, 2, 4, 5)).reshape(*shape, high, wide, settings.channels)
    return Features(content, np.ones(shape, bool), np.full(shape[0], shape[1]), preprocessor)


def _texts(ids: list[np.ndarray], preprocessor: TextPreprocessor, full_width: bool) -> Features:
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    # as wide as any batch can be, so that a batch is a slice
    padded = preprocessor.pad(ids, preprocessor.positions)
    special = np.isin(padded["input_ids"], list(preprocessor.special_ids.values()))
    selectable = (padded["attention_mask"] > 0) & ~special
    return Features(padded["input_ids"], selectable, lengths, preprocessor, full_width)


def _neutral_id(preprocessor: TextPreprocessor) -> int:
    names = {preprocessor.token(number): number for number in range(preprocessor.vocabulary_size)}
    for name in ("[MASK]", "<mask>", "[UNK]", "<unk>"):
        if name in names:
            return names[name]
    return names[preprocessor.words()[0]]
