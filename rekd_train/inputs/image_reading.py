"""One image given for prediction, read and converted; what cannot be used is said with its fix. Torch-free."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rekd_train.errors import Fault

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDE_MODES = ("I", "F")
"""Pillow modes with more than 8 bits a channel start with these letters."""
_PATHS = "give the paths of image files; this model reads images, not texts"
_PIXELS = "give an image of at least one pixel"
_LONGEST_NAME = 80


class UnusableImage(Exception):
    """One image cannot be used; ``fault`` says why."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fault = Fault(what, fix)


def image_name(index: int, item: object) -> str:
    """What messages call an image: its number, counted from 1, and its path where it has one."""
    if not isinstance(item, (str, Path)):
        return f"image {index + 1}"
    path = str(item)
    return f"image {index + 1} ({path if len(path) <= _LONGEST_NAME else path[: _LONGEST_NAME - 3] + '...'})"


def read_image(item: object, channels: int) -> np.ndarray | Image:
    """An array (H, W, ``channels``), or an upright Pillow image of so many channels.

    Raises:
        UnusableImage: of another type, unreadable, or without pixels.
    """
    if isinstance(item, np.ndarray):
        return _array(item, channels)
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(item, (str, Path)):
        try:
            with Image.open(item) as opened:
                opened.load()
        except UnidentifiedImageError:
            raise UnusableImage("cannot be read as an image", _PATHS) from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            missing = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENAMETOOLONG)
            raise UnusableImage(
                "does not exist" if missing else f"cannot be read as an image: {error}", _PATHS
            ) from None
        item = opened
    if not isinstance(item, Image.Image):
        raise UnusableImage(f"is {type(item).__name__}", "give a uint8 array, a Pillow image or a path")
    if item.mode.startswith(_WIDE_MODES):
        raise UnusableImage(f"has more than 8 bits a channel (mode {item.mode})", "convert it to 8 bits")
    if min(item.size) == 0:
        raise UnusableImage(f"has no pixels: {item.size[0]} x {item.size[1]}", _PIXELS)
    try:
        return _converted(ImageOps.exif_transpose(item), channels)
    except (OSError, SyntaxError, ValueError) as error:  # a lazily opened file can be cut off
        raise UnusableImage(f"cannot be read: {error}", "copy it again") from None


def _array(array: np.ndarray, channels: int) -> np.ndarray | Image:
    if array.dtype != np.uint8:
        raise UnusableImage(f"is an array of {array.dtype}", "give uint8, values 0 to 255")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise UnusableImage(f"has the shape {array.shape}", "give (height, width, channels)")
    if 0 in array.shape:
        raise UnusableImage(f"has no pixels: its shape is {array.shape}", _PIXELS)
    if array.shape[2] == channels:
        return array
    from PIL import Image

    return _converted(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), channels)


def _converted(image: Image, channels: int) -> Image:
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may carry transparency, which 'RGB' would warn about
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
