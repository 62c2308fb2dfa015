"""Batches of one size to time with: full length, different each time. torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rekd_deploy.errors import BenchmarkError
from rekd_deploy.parity.examples import generated_images, texts_from_vocabulary
from rekd_train.inputs.preprocessors import Encoded, Preprocessor
from rekd_train.inputs.text import TextPreprocessor

AT_HAND = 4
"""Batches that are taken in turns, so that no cache answers for the model."""


@dataclass(frozen=True)
class Batches:
    """What is answered in one cell of the grid."""

    items: list[list[Any]]
    """Texts or images, (at hand) lists of B."""
    encoded: list[Encoded]
    """The same as tensors, all of one shape."""


def check_lengths(preprocessor: Preprocessor, lengths: Sequence[int]) -> list[int]:
    """The lengths to time; none given: a short, a middle and the greatest of those that are served.

    Returns:
        For images their number of patches, alone.

    Raises:
        BenchmarkError: a length is not served, or lengths were given for images.
    """
    if not isinstance(preprocessor, TextPreprocessor):
        if lengths:
            raise BenchmarkError("the model reads images, which have one length; fix: leave out --lengths")
        return [preprocessor.positions]
    served = preprocessor.settings.buckets
    unknown = [length for length in lengths if length not in served]
    if unknown:
        raise BenchmarkError(
            f"the length {unknown[0]} is not served; lengths: {', '.join(map(str, served))} (others would be padded to "
            "the next)"
        )
    return sorted({*lengths} or {served[len(served) // 4], served[len(served) // 2], served[-1]})


def calibration_items(preprocessor: Preprocessor) -> list[Any]:
    """What int8 graphs that are only timed are calibrated on; their times do not depend on it."""
    if isinstance(preprocessor, TextPreprocessor):
        return texts_from_vocabulary(preprocessor)
    return list(generated_images(preprocessor.settings))


def full_batches(preprocessor: Preprocessor, batch: int, length: int, seed: int = 0) -> Batches:
    """Random words, or images with slopes and noise; texts fill ``length`` tokens, the dearest case.

    Args:
        batch: B.
        length: tokens, one of the lengths that are served; of no meaning for images.
    """
    generator = np.random.default_rng(seed)
    if not isinstance(preprocessor, TextPreprocessor):
        images = generated_images(preprocessor.settings, count=batch * AT_HAND, seed=seed)
        items = [list(images[start : start + batch]) for start in range(0, len(images), batch)]
    else:
        words = preprocessor.words() or ["a"]
        items = [[_text(preprocessor, words, length, generator) for _ in range(batch)] for _ in range(AT_HAND)]
    return Batches(items, [preprocessor(each) for each in items])


def _text(preprocessor: TextPreprocessor, words: Sequence[str], length: int, generator: np.random.Generator) -> str:
    """Words until the tokens are ``length``; a tokenizer may cut a word into several, so the end is cut off."""
    text = " ".join(generator.choice(words, size=length))
    offsets = preprocessor.encode([text])[0].offsets
    if len(offsets) <= length:
        return text
    specials = len(preprocessor.special_ids) - 1  # [PAD] is in no text
    return text[: offsets[length - specials][1]]
