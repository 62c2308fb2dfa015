"""Raw labelled examples, as a source delivers them: texts or images, in named splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

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
    """Examples that occur with different labels; see ``rekd_train.data.duplicates``."""

    def limited(self, counts: dict[str, int | None]) -> DataSet:
        """The first examples of each split: ``counts`` by name of the split, None for all."""
        return replace(self, splits={name: part.head(counts.get(name)) for name, part in self.splits.items()})
