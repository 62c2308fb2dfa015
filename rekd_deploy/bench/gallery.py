"""Answers with their rationale, to be looked at: lines of ``rekd-query --json``."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

from rekd_deploy.client.render import segments, summary
from rekd_deploy.errors import BenchmarkError
from rekd_train.inputs.prediction import Prediction, Span

_LONGEST = 900
"""Characters that are shown of a text."""


@dataclass(frozen=True)
class Shown:
    """One answer, ready to be shown."""

    summary: str
    """Label, probability and how much was read."""
    pieces: tuple[tuple[str, bool], ...] = ()
    """Of a text: pieces, each with whether it is part of the rationale."""
    cut: bool = False
    """Whether the end of the text is left out."""
    image: str = ""
    """Of an image: a PNG as a data address, the kept patches bright."""
    words: str = ""
    """Of an image: the kept patches in words, counted from 1."""


def read_answers(path: Path, limit: int) -> list[Shown]:
    """The first answers of a file; short texts before long ones.

    Args:
        path: lines of JSON, as ``rekd-query --json`` prints them; images lie where their line says, or beside the
            file.

    Raises:
        BenchmarkError: the file is missing or a line is no answer.
        InputError: an image cannot be read.
    """
    path = Path(path)
    found: list[tuple[Prediction, str]] = []
    try:
        # not splitlines: texts hold U+0085 and other characters that it takes for a line's end
        with open(path, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found.append(_answer(line, f"{path}, line {number}"))
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}") from None
    found.sort(key=lambda answer: len(answer[0].text) > _LONGEST)
    return [_shown(prediction, image, path) for prediction, image in found[:limit]]


def _answer(line: str, place: str) -> tuple[Prediction, str]:
    try:
        document = json.loads(line)
        image = document.pop("image", "")
        return Prediction.from_dict(document), image
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BenchmarkError(f"{place} is no answer; fix: give what rekd-query --json printed") from None


def _shown(prediction: Prediction, image: str, path: Path) -> Shown:
    if prediction.text:
        cut = len(prediction.text) > _LONGEST
        kept = prediction
        if cut:
            inside = [span for span in prediction.rationale if isinstance(span, Span) and span.end <= _LONGEST]
            kept = replace(prediction, text=prediction.text[:_LONGEST], rationale=inside)
        return Shown(summary(prediction), tuple(segments(kept)), cut)
    if not image:
        raise BenchmarkError(f"{path} holds an image's answer without its image; fix: rekd-query --image FILE --json")
    from rekd_deploy.client.render import highlighted

    file = Path(image)
    beside = path.parent / file.name
    source = file if file.is_file() or not beside.is_file() else beside
    content = io.BytesIO()
    try:
        highlighted(source, prediction).save(content, format="PNG", optimize=True)
    except OSError as error:
        raise BenchmarkError(f"{source} cannot be read: {error.strerror or error}") from None
    address = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    patches = ", ".join(f"row {patch.row + 1} column {patch.column + 1}" for patch in prediction.rationale)
    return Shown(summary(prediction), image=address, words=f"kept patches: {patches}")
