"""Random numbers that depend on what they are for, not on when they are drawn.

Each draw is a hash of (seed, stage, purpose, step) and of the example's index and position. So the noise of
an example is the same however a batch is split over processes, and a resumed run draws what an uninterrupted
one would have drawn, without a generator's state. The hash is SplitMix64's finaliser, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 23
"""Bits of a draw: (x + 1/2) / 2^23 is exact in float32 and never 0 or 1."""


def key(*numbers: int) -> int:
    """One 64-bit key from a sequence of integers."""
    state = 0
    for number in numbers:
        state = _mix((state + _GOLDEN) ^ (number & _WORD))
    return state


def uniform_scalar(stream: int) -> float:
    """One draw from (0, 1) on the host."""
    return ((_mix(stream + _GOLDEN) >> (64 - _BITS)) + 0.5) / (1 << _BITS)


def uniform(stream: int, examples: Tensor, width: int, channels: int | None = None) -> Tensor:
    """Draws from (0, 1), float32: (B, width), or (B, width, channels).

    The number of an example and a position does not depend on ``width``, so padding changes no draw.

    Args:
        stream: a ``key``.
        examples: (B,) int64, index of each example in its split.
    """
    rows = _mix_tensor(examples * _signed(_GOLDEN) + _signed(stream))
    places = torch.arange(width * (channels or 1), device=examples.device) + 1
    bits = _mix_tensor(rows[:, None] + places * _signed(_GOLDEN))
    draws = (_shifted(bits, 64 - _BITS).float() + 0.5) / (1 << _BITS)
    return draws if channels is None else draws.view(len(examples), width, channels)


def gumbel(stream: int, examples: Tensor, width: int) -> Tensor:
    """Standard Gumbel noise -log(-log U) for both choices of every position: (B, width, 2) float32."""
    return -torch.log(-torch.log(uniform(stream, examples, width, 2)))


def _mix(state: int) -> int:
    state &= _WORD
    state = ((state ^ (state >> 30)) * _FIRST) & _WORD
    state = ((state ^ (state >> 27)) * _SECOND) & _WORD
    return state ^ (state >> 31)


def _mix_tensor(state: Tensor) -> Tensor:
    """``_mix`` in int64, whose products wrap around."""
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, places: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign."""
    return (state >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word
