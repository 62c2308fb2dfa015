"""Images -> the tensor the graphs take, and a mask back -> boxes in the image. Torch-free.

Pixels stay uint8: normalisation and upscaling are part of the network, so that a client sends bytes and
cannot normalise otherwise than in training. ``fingerprint`` says which preprocessing it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_train.errors import ConfigError, FaultyItemsError, InputError
from rekd_train.inputs.image_reading import UnusableImage, image_name, read_image
from rekd_train.inputs.prediction import Patch, Prediction

if TYPE_CHECKING:
    from PIL.Image import Image

    from rekd_train.config.run import BackboneConfig


@dataclass(frozen=True)
class ImageSettings:
    """How images become tensors."""

    height: int
    """Pixels of the images that the model takes; others are resized."""
    width: int
    """Pixels of the images that the model takes; others are resized."""
    channels: int
    """1: grey, 3: red, green, blue."""
    rows: int
    """Rows of the patch grid."""
    columns: int
    """Columns of the patch grid."""
    kind: str = "image"

    def __post_init__(self) -> None:
        mistakes = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("height", "width", "rows", "columns") if getattr(self, name) < 1
        ]
        if self.channels not in (1, 3):
            mistakes.append(f"channels is {self.channels}; it must be 1 (grey) or 3 (red, green, blue)")
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @classmethod
    def of(cls, backbone: BackboneConfig) -> ImageSettings:
        """The settings that a vision network asks for.

        Raises:
            ConfigError: the network reads no images.
        """
        if backbone.image is None:
            raise ConfigError(f"family '{backbone.family}' without the section 'image' reads no images")
        rows, columns = backbone.image.grid
        return cls(backbone.image.height, backbone.image.width, backbone.image.channels, rows, columns)


@dataclass(frozen=True)
class EncodedImages:
    """A batch and what is needed to read a mask back."""

    inputs: dict[str, np.ndarray]
    """``pixels``, uint8 (B, H, W, C)."""
    sizes: list[tuple[int, int]]
    """(width, height) of each image as given, upright."""
    settings: ImageSettings = field(repr=False)

    def predictions(
        self, labels: Sequence[str], probabilities: np.ndarray, mask: np.ndarray, scores: np.ndarray
    ) -> list[Prediction]:
        """Turn model outputs into predictions.

        Args:
            labels: class names, length C.
            probabilities: (B, C).
            mask: (B, N) bool, the kept patches, row by row.
            scores: (B, N), selector scores.
        """
        features = self.settings.rows * self.settings.columns
        answers = []
        for row, size in enumerate(self.sizes):
            kept = np.flatnonzero(mask[row, :features])
            answers.append(
                Prediction(
                    label=labels[int(np.argmax(probabilities[row]))],
                    probabilities={label: float(p) for label, p in zip(labels, probabilities[row], strict=True)},
                    rationale=[self._patch(int(position), size, float(scores[row, position])) for position in kept],
                    rate=len(kept) / features,
                    truncated=False,
                )
            )
        return answers

    def _patch(self, position: int, size: tuple[int, int], score: float) -> Patch:
        row, column = divmod(position, self.settings.columns)
        left, right = _edges(column, self.settings.columns, size[0])
        top, bottom = _edges(row, self.settings.rows, size[1])
        return Patch(row, column, (left, top, right, bottom), score)


class ImagePreprocessor:
    """Reads, converts and resizes images.

    Args:
        settings: size, channels and patch grid.
    """

    def __init__(self, settings: ImageSettings) -> None:
        self.settings = settings
        self.special_ids: dict[str, int] = {}

    @property
    def positions(self) -> int:
        """Patches of an image."""
        return self.settings.rows * self.settings.columns

    @property
    def features(self) -> int:
        """Selectable patches of an image: all."""
        return self.positions

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings: equal fingerprints give equal tensors."""
        canonical = json.dumps(asdict(self.settings), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __call__(self, items: Sequence[Any], first_index: int = 0) -> EncodedImages:
        """Encode images as one batch.

        Args:
            items: uint8 arrays (H, W, C) or (H, W), Pillow images or paths, or one uint8 array (B, H, W, C).
                Photographs are turned upright by their EXIF orientation; an alpha channel is dropped.
            first_index: index of the first image in the call, when ``items`` is a part of it.

        Raises:
            InputError: not a list, or an empty one.
            FaultyItemsError: images that cannot be used, by their number in the call, from 1.
        """
        images, faults = [], {}
        for index, item in enumerate(items := self.check_items(items)):
            try:
                images.append(read_image(item, self.settings.channels))
            except UnusableImage as error:
                faults[first_index + index] = error.fault
        if faults:
            raise FaultyItemsError(faults, lambda index: image_name(index, items[index - first_index]))
        pixels = np.stack([self._pixels(image) for image in images])
        return EncodedImages({"pixels": pixels}, [_size(image) for image in images], self.settings)

    def check_items(self, items: object) -> list[Any]:
        """``items`` as a list of images, unread.

        Raises:
            InputError: not a list, or an empty one.
        """
        if isinstance(items, np.ndarray):
            if items.ndim != 4:
                raise InputError(f"images has the shape {items.shape}; give a list of images or an array (B, H, W, C)")
        elif isinstance(items, str) or not isinstance(items, Sequence):
            raise InputError(f"images is {type(items).__name__}; give a list of arrays, Pillow images or paths")
        if len(items) == 0:
            raise InputError("the list of images is empty; give at least one image")
        return list(items)

    def check_backbone(self, settings: BackboneConfig) -> None:
        """Raise ConfigError if a network of these sizes does not read these images in this patch grid."""
        wanted = ImageSettings.of(settings)
        if wanted != self.settings:
            mine, theirs = (
                f"{s.height} x {s.width} x {s.channels} in {s.rows} x {s.columns} patches"
                for s in (self.settings, wanted)
            )
            raise ConfigError(
                f"selector and predictor must read the same images in the same patches, here {mine}; one reads {theirs}"
                "; fix: the same height, width, channels, upscale_to and patch in selector.image and predictor.image"
            )

    def save(self, directory: Path) -> None:
        """Nothing to write: the settings lie in the checkpoint's config.json."""

    @classmethod
    def load(cls, directory: Path, settings: ImageSettings) -> ImagePreprocessor:
        """The counterpart of ``save``."""
        return cls(settings)

    def _pixels(self, image: np.ndarray | Image) -> np.ndarray:
        """uint8 (height, width, channels) in the model's size."""
        wanted = (self.settings.width, self.settings.height)
        if _size(image) != wanted:
            from PIL import Image

            if isinstance(image, np.ndarray):
                image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            image = image.resize(wanted, Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _size(image: np.ndarray | Image) -> tuple[int, int]:
    """(width, height) in pixels."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def _edges(index: int, cells: int, length: int) -> tuple[int, int]:
    """First pixel and one past the last that a cell of the grid touches."""
    return index * length // cells, -(-(index + 1) * length // cells)
