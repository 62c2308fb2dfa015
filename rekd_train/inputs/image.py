"""Images -> the tensor the graphs take, and a mask back -> boxes in the image. Torch-free.

Pixels stay uint8: normalisation and upscaling are part of the network, so that a client sends bytes and cannot
normalise otherwise than in training. ``fingerprint`` says which preprocessing it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_train.errors import ConfigError, Fault, FaultyItemsError, InputError
from rekd_train.inputs.prediction import Patch, Prediction, most_probable

if TYPE_CHECKING:
    from PIL.Image import Image

    from rekd_train.config.run import BackboneConfig


@dataclass(frozen=True)
class ImageSettings:
    """How images become tensors."""

    height: int
    width: int  # pixels of the images that the model takes; others are resized
    channels: int  # 1: grey, 3: red, green, blue
    rows: int
    columns: int  # of the patch grid
    kind: str = "image"

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.rows, self.columns) < 1 or self.channels not in (1, 3):
            raise ConfigError(f"{self} must hold sizes of at least 1, and 1 channel (grey) or 3 (red, green, blue)")

    @classmethod
    def of(cls, backbone: BackboneConfig) -> ImageSettings:
        """The settings that a vision network asks for; ConfigError: it reads no images."""
        if backbone.image is None:
            raise ConfigError(f"family '{backbone.family}' without the section 'image' reads no images")
        rows, columns = backbone.image.grid
        return cls(backbone.image.height, backbone.image.width, backbone.image.channels, rows, columns)


@dataclass(frozen=True)
class EncodedImages:
    """A batch and what is needed to read a mask back."""

    inputs: dict[str, np.ndarray]  # ``pixels``, uint8 (B, H, W, C)
    sizes: list[tuple[int, int]]  # (width, height) of each image as given, upright
    settings: ImageSettings = field(repr=False)

    def predictions(self, labels: Sequence[str], probabilities: np.ndarray, mask: np.ndarray,
                    scores: np.ndarray) -> list[Prediction]:
        """As those of ``EncodedTexts``; the N columns of ``mask`` are the patches, row by row."""
        rows, columns, found = self.settings.rows, self.settings.columns, []
        for index, (width, height) in enumerate(self.sizes):
            patches = []
            for position in np.flatnonzero(mask[index, : rows * columns]):
                row, column = divmod(int(position), columns)
                (left, right), (top, bottom) = _edges(column, columns, width), _edges(row, rows, height)
                patches.append(Patch(row, column, (left, top, right, bottom), float(scores[index, position])))
            label, by_label = most_probable(labels, probabilities[index])
            found.append(Prediction(label, by_label, patches, rate=len(patches) / (rows * columns), truncated=False))
        return found


class ImagePreprocessor:
    """Reads, converts and resizes images."""

    def __init__(self, settings: ImageSettings) -> None:
        self.settings = settings
        self.special_ids: dict[str, int] = {}
        self.positions = self.features = settings.rows * settings.columns  # patches of an image; all can be selected

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings: equal fingerprints give equal tensors."""
        canonical = json.dumps(asdict(self.settings), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __call__(self, items: Sequence[Any], first_index: int = 0) -> EncodedImages:
        """Encode images as one batch: uint8 arrays (H, W, C) or (H, W), Pillow images or paths, or one (B, H, W, C).

        Photographs are turned upright by their EXIF orientation; an alpha channel is dropped. ``first_index``: of the
        first image in the call, when ``items`` is a part of it. InputError: not a list, or an empty one;
        FaultyItemsError: images that cannot be used, by their number in the call, from 1.
        """
        images, faults = [], {}
        for index, item in enumerate(items := self.check_items(items)):
            try:
                images.append(read_image(item, self.settings.channels))
            except _Unusable as error:
                faults[first_index + index] = Fault(*error.args)
        if faults:
            raise FaultyItemsError(faults, lambda index: _name(index, items[index - first_index]))
        pixels = np.stack([self._pixels(image) for image in images])
        return EncodedImages({"pixels": pixels}, [_size(image) for image in images], self.settings)

    def check_items(self, items: object) -> list[Any]:
        """``items`` as a list of images, unread; InputError: not a list, or an empty one."""
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
            form = "{height} x {width} x {channels} in {rows} x {columns} patches"
            mine, theirs = (form.format(**asdict(settings)) for settings in (self.settings, wanted))
            raise ConfigError(f"selector and predictor must read the same images in the same patches, here {mine}; one "
                              f"reads {theirs}; fix: the same height, width, channels, upscale_to and patch in "
                              "selector.image and predictor.image")

    def _pixels(self, image: np.ndarray | Image) -> np.ndarray:
        """uint8 (height, width, channels) in the model's size."""
        wanted = (self.settings.width, self.settings.height)
        if _size(image) != wanted:
            from PIL import Image

            image = _pillow(image) if isinstance(image, np.ndarray) else image
            image = image.resize(wanted, Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _size(image: np.ndarray | Image) -> tuple[int, int]:
    """(width, height) in pixels."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def _edges(index: int, cells: int, length: int) -> tuple[int, int]:
    """First pixel and one past the last that a cell of the grid touches."""
    return index * length // cells, -(-(index + 1) * length // cells)


_PATHS = "give the paths of image files; this model reads images, not texts"
_PIXELS = "give an image of at least one pixel"
_LONGEST_NAME = 80


class _Unusable(Exception):
    """One image cannot be used; its arguments are those of the ``Fault``."""


def _name(index: int, item: object) -> str:
    """What messages call an image: its number, counted from 1, and its path where it has one."""
    if not isinstance(item, (str, Path)):
        return f"image {index + 1}"
    path = str(item)
    if len(path) > _LONGEST_NAME:  # of a path the end tells most, of a text its beginning
        path = f"...{path[3 - _LONGEST_NAME :]}" if os.sep in path else f"{path[: _LONGEST_NAME - 3]}..."
    return f"image {index + 1} ({path})"


def read_image(item: object, channels: int) -> np.ndarray | Image:
    """An array (H, W, ``channels``), or an upright Pillow image of so many channels."""
    if isinstance(item, np.ndarray):
        return _array(item, channels)
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(item, (str, Path)):
        try:
            with Image.open(item) as opened:
                opened.load()
        except UnidentifiedImageError:
            raise _Unusable("cannot be read as an image", _PATHS) from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            missing = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENAMETOOLONG)
            raise _Unusable("does not exist" if missing else f"cannot be read as an image: {error}", _PATHS) from None
        item = opened
    if not isinstance(item, Image.Image):
        raise _Unusable(f"is {type(item).__name__}", "give a uint8 array, a Pillow image or a path")
    if item.mode.startswith(("I", "F")):
        raise _Unusable(f"has more than 8 bits a channel (mode {item.mode})", "convert it to 8 bits")
    if min(item.size) == 0:
        raise _Unusable(f"has no pixels: {item.size[0]} x {item.size[1]}", _PIXELS)
    try:
        return _converted(ImageOps.exif_transpose(item), channels)
    except (OSError, SyntaxError, ValueError) as error:  # a lazily opened file can be cut off
        raise _Unusable(f"cannot be read: {error}", "copy it again") from None


def _array(array: np.ndarray, channels: int) -> np.ndarray | Image:
    if array.dtype != np.uint8:
        raise _Unusable(f"is an array of {array.dtype}", "give uint8, values 0 to 255")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise _Unusable(f"has the shape {array.shape}", "give (height, width, channels)")
    if 0 in array.shape:
        raise _Unusable(f"has no pixels: its shape is {array.shape}", _PIXELS)
    return array if array.shape[2] == channels else _converted(_pillow(array), channels)


def _pillow(array: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _converted(image: Image, channels: int) -> Image:
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may carry transparency, which 'RGB' would warn about
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
