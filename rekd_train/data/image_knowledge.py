"""Recorded knowledge of images: boxes and coarse maps, laid onto the patches of any student by area.

One row an image. ``file``, its path within the folder of images, or ``id``, the first 16 hex digits of the SHA-256 of
the file (of the pixels, where there are no files); of classes as ``rekd_train.data.knowledge`` says; and any of

    boxes    [[left, top, right, bottom], ...] or with a fifth number, a weight: pixels of the whole image, upright
    map      [[value, ...], ...]: log-odds of a grid of any size, rows from the top
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rekd_train.data.knowledge import AlignedKnowledge, Knowledge, Reader, Statement, text_id
from rekd_train.errors import DataError, listed
from rekd_train.inputs.image import ImagePreprocessor


def names_of(item: Any, folder: Path) -> tuple[str, ...]:
    """What a file may call a text or an image: of an image file its path within ``folder`` first, then the id."""
    if isinstance(item, str):
        return (text_id(item),)
    if isinstance(item, Path):
        path = item.relative_to(folder) if item.is_relative_to(folder) else item
        return path.as_posix(), hashlib.sha256(item.read_bytes()).hexdigest()[:16]
    return (hashlib.sha256(np.ascontiguousarray(item).tobytes()).hexdigest()[:16],)


class ImageReader(Reader):
    """Rows about images."""

    columns = ("file", "id", "probabilities", "label", "confidence", "boxes", "map")

    @staticmethod
    def key(file: str) -> str:
        """The path, without './'."""
        return str(PurePosixPath(file))

    def _marks(self, row: dict[str, Any], _file: str | None) -> np.ndarray | None:
        """(m, 5) float32."""
        if "boxes" not in row:
            return None
        if wrong := [box for box in row["boxes"] if len(box) not in (4, 5)]:
            raise ValueError(f"boxes hold {list(wrong[0])}, not left, top, right, bottom, and a weight where wanted")
        boxes = np.array([(*box, 1.0)[:5] for box in row["boxes"]], dtype=np.float32).reshape(-1, 5)
        for left, top, right, bottom, weight in boxes:
            if not (0 <= left < right < np.inf and 0 <= top < bottom < np.inf and 0 <= weight < np.inf):
                sides = f"[{left:g}, {top:g}, {right:g}, {bottom:g}]"
                raise ValueError(f"boxes hold {sides}, not 0 <= left < right, 0 <= top < bottom, or a wrong weight")
        return boxes

    def _scores(self, row: dict[str, Any], _file: str | None) -> np.ndarray | None:
        """(rows, columns) float32."""
        if "map" not in row:
            return None
        try:
            grid = np.array([list(values) for values in row["map"]], dtype=np.float32)
        except (TypeError, ValueError):
            grid = np.zeros(0)
        if grid.ndim != 2 or 0 in grid.shape or not np.isfinite(grid).all():
            raise ValueError("the map is no grid of finite numbers")
        return grid


def align_images(
    knowledge: Knowledge, images: Iterable[Any], preprocessor: ImagePreprocessor, classes: int, folder: Path
) -> AlignedKnowledge:
    """The statements about these images, in their order; DataError names every box that leaves its image."""
    nothing = Statement(None, None, None)
    rows, columns = preprocessor.settings.rows, preprocessor.settings.columns
    probabilities, scores, marks, wrong = [], [], [], []
    for image in images:
        name = next((name for name in names_of(image, folder) if name in knowledge.statements), "")
        said = knowledge.statements.get(name, nothing)
        unknown = np.full(classes, np.nan, dtype=np.float32)
        probabilities.append(unknown if said.probabilities is None else said.probabilities)
        scores.append(None if said.scores is None else on_patches(said.scores, rows, columns))
        marks.append(None)
        if said.marks is not None:
            width, height = preprocessor([image]).sizes[0]
            if (said.marks[:, 2:4] > (width, height)).any():
                wrong.append(f"{name}: a box leaves the image, which has {width} x {height} pixels")
            marks[-1] = marked_patches(said.marks / np.float32([width, height, width, height, 1]), rows, columns)
    if wrong:
        raise DataError(f"{knowledge.path}: {listed(wrong)}; fix: left, top, right, bottom in pixels of the image")
    return AlignedKnowledge(np.array(probabilities), scores, marks)


def on_patches(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows * columns,) float32: under each patch the mean of a grid of any size, by the area they share."""
    high, wide = (np.arange(count + 1) / count for count in grid.shape)
    means = _shares(high[:-1], high[1:], rows).T @ grid @ _shares(wide[:-1], wide[1:], columns)
    return means.astype(np.float32).ravel()


def marked_patches(boxes: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows * columns,) float32: the weight of boxes (m, 5) in parts of the image, times how far they fill a patch.

    A box that is smaller than a patch counts by how much of the box lies in it.
    """
    left, top, right, bottom, weight = boxes.T
    filled = _shares(top, bottom, rows)[:, :, None] * _shares(left, right, columns)[:, None, :]
    smaller = np.maximum(1, 1 / (rows * columns * (right - left) * (bottom - top)))
    return (filled * (weight * smaller)[:, None, None]).max(axis=0, initial=0).astype(np.float32).ravel()


def _shares(starts: np.ndarray, ends: np.ndarray, cells: int) -> np.ndarray:
    """(m, cells): the part of each of so many equal cells of 0..1 that lies within an interval."""
    edges = np.arange(cells + 1) / cells
    shared = np.minimum(ends[:, None], edges[1:]) - np.maximum(starts[:, None], edges[:-1])
    return np.clip(shared, 0, None) * cells
