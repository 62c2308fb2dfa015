"""Optimisation profiles: which shapes an engine accepts and which it is tuned for, from the signature alone.

Buckets cut each axis into ranges that touch but do not overlap (lengths 64, 128: 3..64 and 65..128, each tuned for its
end), so every shape has exactly one profile. Triton picks it the same way. Time and size of a build grow with their
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from rekd_deploy.contract.signature import BATCH, LENGTH, SHORTEST, SLOTS, GraphSignature
from rekd_deploy.errors import EngineError

_TUNED_BATCH = 8

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Smallest, tuned and largest shape by input."""


@dataclass(frozen=True)
class Range:
    """Sizes of one axis in one profile."""

    smallest: int
    tuned: int
    largest: int


def batch_ranges(batches: Sequence[int] | None, max_batch_size: int) -> list[Range]:
    """Ranges that cover 1..max_batch_size.

    Args:
        batches: tuned batch sizes in any order; None: one range, tuned for 8.

    Raises:
        EngineError: a batch size is out of range.
    """
    if batches is None:
        return [Range(1, min(_TUNED_BATCH, max_batch_size), max_batch_size)]
    return _ranges(batches, 1, max_batch_size, "batch size", "the largest batch of the server")


def length_ranges(lengths: Sequence[int], max_length: int) -> list[Range]:
    """Ranges that cover the shortest text to max_length; raises as ``batch_ranges``."""
    return _ranges(lengths, SHORTEST, max_length, "length", "the longest input of the model")


def _ranges(sizes: Sequence[int], smallest: int, largest: int, what: str, whose: str) -> list[Range]:
    wrong = [size for size in sizes if not smallest <= size <= largest]
    if wrong:
        raise EngineError(f"{what} {wrong[0]} is outside {smallest}..{largest} ({whose}); fix: choose others")
    ranges, start = [], smallest
    for size in sorted({*sizes, largest}):
        # not a single size: where all sizes are fixed, the steps of an LSTM are unrolled, in minutes and gigabytes
        end = min(size + 1, largest) if start == size else size
        if start <= end:
            ranges.append(Range(start, min(size, end), end))
        start = end + 1
    return ranges


def profiles_of(signature: GraphSignature, batches: Sequence[Range], lengths: Sequence[Range]) -> list[Profile]:
    """One profile for each pair of a batch and a length range; a signature without a length has one a batch range.

    Slots have the range that belongs to the lengths.
    """
    symbols = {axis for spec in signature.inputs for axis in spec.shape if isinstance(axis, str)}
    if unknown := symbols - {BATCH, LENGTH, SLOTS}:
        raise EngineError(f"the axes {', '.join(sorted(unknown))} have no ranges")
    pairs = product(batches, lengths if LENGTH in symbols else [None])
    axes = [{BATCH: batch, LENGTH: length} for batch, length in pairs]
    if SLOTS in symbols:
        for ranges in axes:
            length, slots = ranges[LENGTH], signature.slots
            ranges[SLOTS] = Range(slots.at(length.smallest), slots.at(length.tuned), slots.at(length.largest))
    return [
        {
            spec.name: tuple(
                tuple(getattr(ranges[axis], end) if isinstance(axis, str) else axis for axis in spec.shape)
                for end in ("smallest", "tuned", "largest")
            )
            for spec in signature.inputs
        }
        for ranges in axes
    ]
