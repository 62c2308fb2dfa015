"""A prediction for people: a text with its rationale highlighted, or an image with its patches. torch-free."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_train.errors import InputError
from rekd_train.files import write_bytes, write_json
from rekd_train.inputs.image import read_image
from rekd_train.inputs.prediction import Prediction

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.text import Text

HIGHLIGHT = "bold black on yellow"
_CUT = "(the text is longer than the model reads; its end was cut)"
_UNUSUAL = "(doubtful: unlike the texts that the model has learnt from)"
STRANGE = 0.995  # doubt from which an answer is called so: one in two hundred of the usual texts
_LEAST_SIDE = 320
"""Smaller images are enlarged, whole pixels by whole factors, so that a person can see the patches."""
_DIMMED = 0.25
_WEAKEST = 0.6
"""Brightness of the weakest kept patch; the strongest has 1."""
_FRAME = (255, 213, 0)
_LABEL = 32  # characters; longer ones are cut
_TEXT, _SMALL = (255, 255, 255), (200, 200, 200)


def segments(prediction: Prediction) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is part of the rationale."""
    pieces, end = [], 0
    for span in prediction.rationale:
        pieces += [(prediction.text[end : span.start], False), (prediction.text[span.start : span.end], True)]
        end = span.end
    return [piece for piece in (*pieces, (prediction.text[end:], False)) if piece[0]]


def summary(prediction: Prediction) -> str:
    """Label, probability and how much was read, on one line."""
    parts = "tokens" if prediction.text else "patches"
    line = f"{prediction.label}  {prediction.probability:.1%}  from {prediction.rate:.1%} of its {parts}"
    if prediction.doubt is not None and prediction.doubt > STRANGE:
        line = f"{line}  {_UNUSUAL}"
    return f"{line}  {_CUT}" if prediction.truncated else line


def shows_colours(console: Console) -> bool:
    """Whether a highlight can be seen there: a terminal with colours, not switched off by NO_COLOR."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def terminal_text(prediction: Prediction) -> Text:
    """A summary line and the text, its rationale highlighted; for terminals with colours (else ``plain_text``)."""
    from rich.text import Text

    pieces = [(_harmless(piece), HIGHLIGHT if chosen else "") for piece, chosen in segments(prediction)]
    return Text.assemble((f"{summary(prediction)}\n", "bold"), *pieces)


def plain_text(prediction: Prediction) -> str:
    """Without colours: the rationale in [[double brackets]]; an image's patches, the strongest first, from row 1."""
    if prediction.text:
        pieces = [f"[[{_harmless(piece)}]]" if chosen else _harmless(piece) for piece, chosen in segments(prediction)]
        return f"{summary(prediction)}\n{''.join(pieces)}"
    ranked = sorted(prediction.rationale, key=lambda patch: -patch.score)
    patches = [f"row {patch.row + 1} column {patch.column + 1} ({patch.score:+.2f})" for patch in ranked]
    return f"{summary(prediction)}\n{', '.join(patches)}"


def _harmless(text: str) -> str:
    """Control characters become a replacement mark, so that a review cannot steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() or c.isspace() and ord(c) > 0x9F else "�" for c in text)


def highlighted(image: str | Path | np.ndarray | Image, prediction: Prediction) -> Image:
    """The image that was predicted on, upright and in colour, with the kept patches framed and the rest dimmed.

    The patch with the highest score is as bright as the image, the one with the lowest has 0.6 of it, the frames
    likewise; the others lie between, by their scores. Arrays are uint8 (H, W, C) or (H, W).
    """
    from PIL import Image as images
    from PIL import ImageDraw

    upright = _upright(image)
    factor = max(1, -(-_LEAST_SIDE // max(upright.size)))
    shown = upright.resize((upright.width * factor, upright.height * factor), images.Resampling.NEAREST)
    canvas = _darkened(shown, _DIMMED)
    draw = ImageDraw.Draw(canvas)
    patches = sorted(prediction.rationale, key=lambda patch: patch.score)  # the strongest frame on top
    low, high = (patches[0].score, patches[-1].score) if patches else (0.0, 0.0)
    for patch in patches:
        brightness = 1.0 if high == low else _WEAKEST + (1 - _WEAKEST) * (patch.score - low) / (high - low)
        left, top, right, bottom = box = tuple(edge * factor for edge in patch.box)
        canvas.paste(_darkened(shown.crop(box), brightness), box)
        frame = tuple(int(colour * brightness) for colour in _FRAME)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=frame, width=max(1, max(shown.size) // 160))
    return canvas


def write_rationale(image: str | Path, prediction: Prediction, png: Path) -> None:
    """``captioned`` as a PNG file, its folder made if need be, and JSON beside it; InputError: it cannot be written."""
    content = io.BytesIO()
    captioned(image, prediction).save(content, format="PNG")
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(png, content.getvalue())
        write_json(png.with_suffix(".json"), {"image": str(image), **prediction.to_dict()})
    except OSError as error:
        raise InputError(f"{png} cannot be written: {error.strerror}; fix: another folder") from None


def captioned(image: str | Path | np.ndarray | Image, prediction: Prediction) -> Image:
    """``highlighted`` with the label, its probability and what the shades mean written above it."""
    from PIL import ImageDraw, ImageFont, ImageOps

    picture = highlighted(image, prediction)
    size = max(20, max(picture.size) // 24)
    margin, small = size // 2, size * 2 // 3
    side = max(_LEAST_SIDE - picture.width, 0)
    band = 3 * margin + size + small
    canvas = ImageOps.expand(picture, (side // 2, band, side - side // 2, 0))
    draw = ImageDraw.Draw(canvas)
    room = canvas.width - 2 * margin
    label = prediction.label if len(prediction.label) <= _LABEL else f"{prediction.label[: _LABEL - 3]}..."
    for text, height, top, colour in (
        (f"{label}  {prediction.probability:.1%}", size, margin, _TEXT),
        (f"from {prediction.rate:.1%} of its patches; brightest frame: strongest", small, 2 * margin + size, _SMALL),
    ):
        wanted = ImageFont.load_default(height).getlength(text)
        font = ImageFont.load_default(int(height * min(room / wanted, 1)))
        draw.text((margin, top), text, colour, font=font)
    return canvas


def _darkened(image: Image, brightness: float) -> Image:
    from PIL import Image as images

    return images.fromarray((np.asarray(image) * brightness).astype(np.uint8))


def _upright(image: Any) -> Image:
    from PIL import Image as images

    if isinstance(image, (str, Path)):
        with images.open(image) as opened:
            opened.load()
        image = opened
    found = read_image(image, 3)
    return images.fromarray(found) if isinstance(found, np.ndarray) else found
