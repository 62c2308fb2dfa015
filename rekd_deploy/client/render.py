"""A prediction for people: a text with its rationale highlighted, or an image with its patches. torch-free.

In an image the kept patches are framed, the stronger the brighter, and the rest is dimmed.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_train.errors import InputError
from rekd_train.files import write_bytes, write_json
from rekd_train.inputs.prediction import RATIONALE, Patch, Prediction

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.text import Text

HIGHLIGHT = "bold black on yellow"
_CUT = "(the text is longer than the model reads; its end was cut)"
_LEAST_SIDE = 320
"""Smaller images are enlarged, whole pixels by whole factors, so that a person can see the patches."""
_DIMMED = 0.25
_WEAKEST = 0.6
"""Brightness of the weakest kept patch; the strongest has 1."""
_FRAME = (255, 213, 0)
_LEAST_FONT = 12
_TEXT, _SMALL = (255, 255, 255), (200, 200, 200)


def segments(prediction: Prediction) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is part of the rationale."""
    end = 0
    for span in prediction.rationale:
        if span.start > end:
            yield prediction.text[end : span.start], False
        yield prediction.text[span.start : span.end], True
        end = span.end
    if end < len(prediction.text):
        yield prediction.text[end:], False


def summary(prediction: Prediction) -> str:
    """Label, probability and how much was read, on one line."""
    parts = "tokens" if prediction.text else "patches"
    line = f"{prediction.label}  {prediction.probability:.1%}  from {prediction.rate:.1%} of its {parts}"
    return f"{line}  {_CUT}" if prediction.truncated else line


def shows_colours(console: Console) -> bool:
    """Whether a highlight can be seen there: a terminal with colours, not switched off by NO_COLOR."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def terminal_text(prediction: Prediction) -> Text:
    """A summary line and the text, its rationale highlighted; for terminals with colours (else ``plain_text``).

    Control characters in the text are shown as a replacement mark, so that a review cannot steer the terminal.
    """
    from rich.text import Text

    shown = Text()
    shown.append(f"{summary(prediction)}\n", style="bold")
    for piece, chosen in segments(prediction):
        shown.append(_harmless(piece), style=HIGHLIGHT if chosen else None)
    return shown


def plain_text(prediction: Prediction) -> str:
    """As ``terminal_text`` without colours: the rationale stands in [[double brackets]]."""
    if not prediction.text:
        return f"{summary(prediction)}\n{_patches(prediction)}"
    body = "".join(f"[[{_harmless(piece)}]]" if chosen else _harmless(piece) for piece, chosen in segments(prediction))
    return f"{summary(prediction)}\n{body}"


def _patches(prediction: Prediction) -> str:
    """The kept patches of an image, the strongest first; rows and columns counted from 1."""
    ranked = sorted(prediction.rationale, key=lambda patch: -patch.score)
    return ", ".join(f"row {patch.row + 1} column {patch.column + 1} ({patch.score:+.2f})" for patch in ranked)


def _harmless(text: str) -> str:
    return "".join(c if c in "\n\t" or c.isprintable() or c.isspace() and ord(c) > 0x9F else "�" for c in text)


def highlighted(image: str | Path | np.ndarray | Image, prediction: Prediction) -> Image:
    """The image, upright and in colour, with the kept patches highlighted.

    The patch with the highest score is as bright as the image, the one with the lowest has 0.6 of it, the frames
    likewise; the others lie between, by their scores.

    Args:
        image: what was predicted on: a path, a Pillow image, or uint8 (H, W, C) or (H, W).
        prediction: of that image.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    upright = _upright(image)
    factor = max(1, -(-_LEAST_SIDE // max(upright.size)))
    shown = upright.resize((upright.width * factor, upright.height * factor), images.Resampling.NEAREST)
    canvas = _darkened(shown, _DIMMED)
    draw = ImageDraw.Draw(canvas)
    width = max(1, max(shown.size) // 160)
    patches: list[Patch] = sorted(prediction.rationale, key=lambda patch: patch.score)  # the strongest frame on top
    for patch, brightness in zip(patches, _brightness([patch.score for patch in patches]), strict=True):
        left, top, right, bottom = box = tuple(edge * factor for edge in patch.box)
        canvas.paste(_darkened(shown.crop(box), brightness), box)
        frame = tuple(int(colour * brightness) for colour in _FRAME)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=frame, width=width)
    return canvas


def captioned(image: str | Path | np.ndarray | Image, prediction: Prediction) -> Image:
    """``highlighted`` with the label, its probability and what the shades mean written above it."""
    from PIL import Image as images
    from PIL import ImageDraw

    picture = highlighted(image, prediction)
    width = max(picture.width, _LEAST_SIDE)
    size = max(20, max(picture.size) // 24)
    legend = f"from {prediction.rate:.1%} of its patches; brightest frame: strongest"
    lines = [(prediction.label, f"  {prediction.probability:.1%}", size, _TEXT), (legend, "", size * 2 // 3, _SMALL)]
    margin = size // 2
    band = margin + sum(height + margin for _, _, height, _ in lines)
    canvas = images.new("RGB", (width, band + picture.height))
    canvas.paste(picture, ((width - picture.width) // 2, band))
    draw, top = ImageDraw.Draw(canvas), margin
    for text, end, height, colour in lines:
        fitting, font = _fitting(text, end, height, width - 2 * margin)
        draw.text((margin, top), fitting, colour, font=font)
        top += height + margin
    return canvas


def rationale_files(images: Iterable[Path], folder: Path) -> dict[Path, Path]:
    """The picture in ``folder`` that shows each image's rationale: NAME.rationale.png.

    Raises:
        InputError: two images of one name.
    """
    files: dict[Path, Path] = {}
    for image in dict.fromkeys(images):
        file = folder / f"{image.stem}{RATIONALE}"
        if file in files.values():
            raise InputError(f"{image} and another image would be saved to the same file, {file}; fix: save them apart")
        files[image] = file
    return files


def write_rationale(image: str | Path, prediction: Prediction, png: Path) -> None:
    """``captioned`` as a PNG file, in a folder that is made if need be, and the prediction as JSON beside it.

    Raises:
        InputError: a file cannot be written.
    """
    content = io.BytesIO()
    captioned(image, prediction).save(content, format="PNG")
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(png, content.getvalue())
        write_json(png.with_suffix(".json"), {"image": str(image), **prediction.to_dict()})
    except OSError as error:
        raise InputError(f"{png} cannot be written: {error.strerror}; fix: another folder") from None


def _brightness(scores: Sequence[float]) -> list[float]:
    """From ``_WEAKEST`` for the lowest score to 1 for the highest; 1 where all are equal."""
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    return [1.0 if high == low else _WEAKEST + (1 - _WEAKEST) * (score - low) / (high - low) for score in scores]


def _darkened(image: Image, brightness: float) -> Image:
    from PIL import Image as images

    return images.fromarray((np.asarray(image) * brightness).astype(np.uint8))


def _fitting(text: str, end: str, size: int, width: int) -> tuple[str, Any]:
    """The text and its end, and a font of up to ``size`` pixels in which they fit; a text too long for that is cut."""
    from PIL import ImageFont

    length = ImageFont.load_default(size).getlength(text + end)
    font = ImageFont.load_default(max(_LEAST_FONT, min(size, int(size * width / max(length, 1)))))
    shown = text
    while font.getlength(shown + end) > width and text:
        text = text[:-1]
        shown = f"{text}..."
    return shown + end, font


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
