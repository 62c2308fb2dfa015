"""An image with its rationale highlighted: kept patches stay bright and framed, the rest is dimmed. torch-free."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_train.errors import InputError
from rekd_train.files import write_bytes, write_json
from rekd_train.prediction import Patch, Prediction

if TYPE_CHECKING:
    from PIL.Image import Image

_LEAST_SIDE = 256
"""Smaller images are enlarged, whole pixels by whole factors, so that a person can see the patches."""
_DIMMED = 0.3
_FRAME = (255, 213, 0)


def highlighted(image: str | Path | np.ndarray | Image, prediction: Prediction) -> Image:
    """The image, upright and in colour, with the kept patches highlighted.

    Args:
        image: what was predicted on: a path, a Pillow image, or uint8 (H, W, C) or (H, W).
        prediction: its answer.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    upright = _upright(image)
    factor = max(1, -(-_LEAST_SIDE // max(upright.size)))
    shown = upright.resize((upright.width * factor, upright.height * factor), images.Resampling.NEAREST)
    canvas = images.fromarray((np.asarray(shown) * _DIMMED).astype(np.uint8))
    boxes = [_scaled(patch, factor) for patch in prediction.rationale]
    for box in boxes:
        canvas.paste(shown.crop(box), box)
    draw = ImageDraw.Draw(canvas)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_FRAME)
    return canvas


def write_png(image: str | Path | np.ndarray | Image, prediction: Prediction, path: Path) -> None:
    """``highlighted`` as a PNG file.

    Raises:
        InputError: the file cannot be written.
    """
    content = io.BytesIO()
    highlighted(image, prediction).save(content, format="PNG")
    try:
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def write_rationale(image: str | Path, prediction: Prediction, png: Path) -> Path:
    """``highlighted`` as a PNG file, and the prediction as JSON beside it; returns the latter's path.

    Raises:
        InputError: a file cannot be written.
    """
    beside = png.with_suffix(".json")
    write_png(image, prediction, png)
    try:
        write_json(beside, {"image": str(image), **prediction.to_dict()})
    except OSError as error:
        raise InputError(f"{beside} cannot be written: {error.strerror}") from None
    return beside


def _upright(image: Any) -> Image:
    from PIL import Image as images
    from PIL import ImageOps

    if isinstance(image, np.ndarray):
        image = images.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    elif isinstance(image, (str, Path)):
        with images.open(image) as opened:
            opened.load()
        image = opened
    return ImageOps.exif_transpose(image).convert("RGB")


def _scaled(patch: Patch, factor: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = patch.box
    return left * factor, top * factor, right * factor, bottom * factor
