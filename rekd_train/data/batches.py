"""Which examples make a batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def bucketed_batches(
    lengths: np.ndarray, batch_size: int, generator: np.random.Generator | None = None
) -> Iterator[np.ndarray]:
    """Index batches of similar length, so that little padding is computed.

    Args:
        lengths: (n,) tokens.
        generator: shuffles; None: ascending length, every example once, for evaluation.
    """
    if generator is None:
        order = np.argsort(lengths, kind="stable")
        yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))
        return
    order = generator.permutation(len(lengths))
    pool = batch_size * 16
    batches = []
    for start in range(0, len(order), pool):
        block = order[start : start + pool]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[first : first + batch_size] for first in range(0, len(block), batch_size)]
    for index in generator.permutation(len(batches)):
        yield batches[index]
