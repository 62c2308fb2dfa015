"""Inputs and scores constructed to be awkward: shortest, longest, padded, at the budget's steps, tied. torch-free."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rekd_deploy.runtimes.base import Arrays
from rekd_train.inputs.image import ImageSettings
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor


def constructed_inputs(preprocessor: Preprocessor, policy: SelectionPolicy, capacity: int) -> Iterator[Arrays]:
    """Batches of inputs as the graphs take them: see ``constructed_texts`` and ``constructed_images``."""
    if preprocessor.settings.kind == "image":
        return constructed_images(preprocessor.settings)
    return constructed_texts(preprocessor, policy, capacity)


def constructed_images(settings: ImageSettings) -> Iterator[Arrays]:
    """Batches {"pixels"}, uint8 (B, height, width, channels): black, white, a point, a board, noise."""
    generator = np.random.default_rng(0)
    size = (settings.height, settings.width, settings.channels)
    noise = generator.integers(0, 256, (5, *size), dtype=np.uint8)
    point = np.zeros(size, np.uint8)
    point[-1, -1] = 255
    board = np.broadcast_to((np.indices(size[:2]).sum(axis=0) % 2 * 255)[:, :, None], size).astype(np.uint8)
    odd = np.stack([np.zeros(size, np.uint8), np.full(size, 255, np.uint8), point, board, noise[0]])
    for batch in (*odd[:, None], odd, noise):
        yield {"pixels": np.ascontiguousarray(batch)}


def constructed_texts(preprocessor: TextPreprocessor, policy: SelectionPolicy, capacity: int) -> Iterator[Arrays]:
    """Batches of random word ids: {"input_ids", "attention_mask"}, both (B, N) int64.

    One word alone and at every padding, no word at all, full length, mixed lengths in one batch, fewer
    positions than slots, and word counts at which the budget takes its first and its last step.
    """
    longest = preprocessor.settings.max_length
    for width in sorted({3, min(4, longest), *preprocessor.settings.buckets}):
        yield _batch(preprocessor, [1], width)
    yield _batch(preprocessor, [0, 1], min(8, longest))
    yield _batch(preprocessor, [longest - 2] * 3, longest)
    mixed = {1, 2, 3, longest // 4, longest // 2, longest - 2}
    yield _batch(preprocessor, sorted(count for count in mixed if 1 <= count <= longest - 2), longest)
    if capacity > 3:
        yield _batch(preprocessor, [1, capacity - 3], capacity - 1)
    for width in (width for width in preprocessor.settings.buckets if width < longest):  # each has slots of its own
        steps = budget_steps(policy, width - 2, policy.capacity(width - 2))
        yield _batch(preprocessor, sorted({*(count for count in steps if count >= 1), width - 2}), width)
    steps = [count for count in budget_steps(policy, longest - 2, capacity) if 1 <= count <= longest - 2]
    for count in steps:
        yield _batch(preprocessor, [count], count + 2)
    if steps:
        yield _batch(preprocessor, steps, longest)


def constructed_scores(preprocessor: Preprocessor, policy: SelectionPolicy, capacity: int) -> Iterator[Arrays]:
    """Batches with scores: {"scores" (B, N) float32} and the inputs.

    All equal, equal in groups around the cut, equal to the threshold, rising, falling, zeros of both
    signs, very large; texts each at full length, padded, and with fewer positions than slots.
    """
    threshold = np.float32(0.0 if policy.bias is None else -policy.bias)
    generator = np.random.default_rng(0)
    if preprocessor.settings.kind == "image":
        inputs = next(batch for batch in constructed_images(preprocessor.settings) if len(batch["pixels"]) > 1)
        for scores in _awkward((len(inputs["pixels"]), preprocessor.positions), threshold, generator):
            yield {"scores": scores, **inputs}
        return
    longest = preprocessor.settings.max_length
    steps = budget_steps(policy, longest - 2, capacity)
    counts = sorted({count for count in (0, 1, 2, *steps, longest // 2, longest - 2) if 0 <= count <= longest - 2})
    for width in sorted({longest, max(3, min(capacity - 1, longest))}):
        fitting = [count for count in counts if count + 2 <= width]
        inputs = _batch(preprocessor, fitting, width)
        for scores in _awkward(inputs["input_ids"].shape, threshold, generator):
            yield {"scores": scores, **inputs}


def _awkward(shape: tuple[int, ...], threshold: np.float32, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Scores (B, N) float32 that are hard to decide on."""
    place = np.broadcast_to(np.arange(shape[1], dtype=np.float32), shape)
    for scores in (
        np.zeros(shape),
        np.full(shape, threshold),
        np.full(shape, np.nextafter(threshold, np.float32(np.inf))),
        np.full(shape, -7.5),
        np.full(shape, 7.5),
        place - 2,
        2 - place,
        generator.integers(0, 2, shape) * 4 - 2,
        generator.integers(-2, 3, shape) + threshold,
        np.where(generator.random(shape) < 0.5, -0.0, 0.0),
        generator.normal(size=shape) * 1e30,
    ):
        yield np.ascontiguousarray(scores, dtype=np.float32)


def budget_steps(policy: SelectionPolicy, most: int, capacity: int) -> list[int]:
    """Counts of selectable features just below and at which the budget grows to 2 and to ``capacity``."""
    limits = policy.limits(np.arange(most + 1))
    counts: set[int] = set()
    for size in {2, capacity}:
        reached = np.flatnonzero(limits >= size)
        if len(reached):
            counts |= {int(reached[0]) - 1, int(reached[0])}
    return sorted(counts)


def _batch(preprocessor: TextPreprocessor, word_counts: list[int], width: int) -> Arrays:
    """Rows [CLS] words [SEP] padding with so many random words each."""
    special = preprocessor.special_ids
    ordinary = np.setdiff1d(np.arange(preprocessor.vocabulary_size), list(special.values()))
    generator = np.random.default_rng([width, *word_counts])
    rows = [
        [special["cls"], *generator.choice(ordinary, size=count).tolist(), special["sep"]] for count in word_counts
    ]
    return preprocessor.pad(rows, width)
