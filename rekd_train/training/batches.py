"""A split as batches on the device, and the noise for them: functions of seed, stage, step and example alone.

Each draw is a hash of (seed, stage, purpose, step) and of the example's index and position. So the noise of
an example is the same however a batch is split over processes, and a resumed run draws what an uninterrupted
one would have drawn, without a generator's state. The hash is SplitMix64's finaliser, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rekd_train.data import Split, bucketed_batches
from rekd_train.inputs.preprocessors import Preprocessor, full_length
from rekd_train.training.runtime import Runtime

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


@dataclass
class Batch:
    """One process's part of a training step's examples."""

    indices: Tensor
    """(B,) int64, index of each example in its split."""
    inputs: dict[str, Tensor]
    labels: Tensor
    """(B,) int64."""
    step: int
    steps: int
    """Of the stage."""
    examples: int
    """Examples of the whole batch, over all processes."""
    present: int
    """Examples of this part; 0 if it is empty: then one example stands in, which must not count."""
    weights: Tensor | None = None
    """(B,) float32, of the examples in the cross-entropy; None: all 1."""

    @property
    def share(self) -> float:
        """This part's examples / the whole batch's."""
        return self.present / self.examples


def example_weights(labels: np.ndarray, class_weights: str) -> np.ndarray | None:
    """(n,) float32 weights of examples in the cross-entropy, 1 on average; None: all 1.

    Args:
        class_weights: 'none', or 'balanced': n / (classes * examples of the class), as scikit-learn calls it.
    """
    if class_weights == "none":
        return None
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / (len(classes) * counts[numbers])).astype(np.float32)


class FullLength:
    """A split of texts whose batches are all padded to the longest input: for policies that may select padding.

    Args:
        preprocessor: gives the length and the padding's token id.
    """

    augmented = False
    truth = None

    def __init__(self, split: Split, preprocessor: Preprocessor) -> None:
        self._split, self._preprocessor = split, preprocessor
        self.labels, self.lengths = split.labels, split.lengths

    def __len__(self) -> int:
        return len(self._split)

    def inputs(self, indices: Sequence[int], generator: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The batch, as wide as the preprocessing allows."""
        return full_length(self._split.inputs(indices), self._preprocessor)


class Batches:
    """All batches of one stage.

    Args:
        split: training examples.
        size: examples of a global batch.
        steps: of the stage.
        seed: of the stage: a ``key``.
        length_buckets: batches of similar length.
        class_weights: see ``example_weights``.
    """

    def __init__(
        self, split: Split, size: int, steps: int, seed: int, length_buckets: bool, runtime: Runtime,
        class_weights: str = "none",
    ) -> None:  # fmt: skip
        self._split, self._size, self._steps, self._seed = split, size, steps, seed
        self._lengths = split.lengths if length_buckets else np.zeros(len(split), dtype=np.int64)
        self._runtime = runtime
        self._weights = example_weights(split.labels, class_weights)
        self.per_epoch = -(-len(split) // size)

    def starting_at(self, first: int) -> Iterator[Batch]:
        """Batches of the steps from ``first`` on."""
        for epoch in range(first // self.per_epoch, -(-self._steps // self.per_epoch)):
            order = list(bucketed_batches(self._lengths, self._size, np.random.default_rng([self._seed, epoch])))
            for place, indices in enumerate(order):
                step = epoch * self.per_epoch + place
                if first <= step < self._steps:
                    yield self._batch(indices, step)

    def _batch(self, indices: np.ndarray, step: int) -> Batch:
        part = self._runtime.part(indices)
        own = part if len(part) else indices[:1]
        if self._split.augmented:
            # of the whole batch, whoever computes which part: so the images do not depend on the partition
            whole = self._split.inputs(indices, np.random.default_rng(key(self._seed, step)))
            rows = self._runtime.part(np.arange(len(indices))) if len(part) else [0]
            arrays = {name: np.ascontiguousarray(array[rows]) for name, array in whole.items()}
        else:
            arrays = self._split.inputs(own)
        return Batch(
            indices=self._runtime.to_device(np.ascontiguousarray(own)),
            inputs={name: self._runtime.to_device(array) for name, array in arrays.items()},
            labels=self._runtime.to_device(self._split.labels[own]),
            step=step,
            steps=self._steps,
            examples=len(indices),
            present=len(part),
            weights=None if self._weights is None else self._runtime.to_device(self._weights[own]),
        )


def all_batches(split: Split, runtime: Runtime, share_out: bool = False, size: int = 128) -> Iterator[Batch]:
    """Every example once, as it is, in batches of similar length; ``share_out``: each process some of them."""
    for place, indices in enumerate(bucketed_batches(split.lengths, size)):
        if not share_out or place % runtime.processes == runtime.rank:
            yield Batch(
                indices=runtime.to_device(indices),
                inputs={name: runtime.to_device(array) for name, array in split.inputs(indices).items()},
                labels=runtime.to_device(split.labels[indices]),
                step=place, steps=1, examples=len(indices), present=len(indices),
            )  # fmt: skip



def answers(
    split: Split, runtime: Runtime, precision: str, ask: Callable[[Batch], Sequence[Tensor]], count: int
) -> list[Tensor]:
    """What a frozen model says about every example as it is, in the split's order; processes share the work.

    Args:
        ask: from a batch to ``count`` tensors (B, M) or (B, M, K).

    Returns:
        Of each (n, longest M, K) float32 on the device, also of bool; shorter M are filled with 0.
    """
    rows: list[Tensor] = []
    parts: list[list[Tensor]] = [[] for _ in range(count)]  # also in a process that has no batch
    for batch in all_batches(split, runtime, share_out=True):
        with torch.inference_mode(), runtime.autocast(precision):
            for each, answer in zip(parts, ask(batch), strict=True):
                each.append(answer.float())
        rows.append(batch.indices)
    return [_collected(rows, each, len(split), runtime) for each in parts]


def _collected(rows: list[Tensor], parts: list[Tensor], examples: int, runtime: Runtime) -> Tensor:
    width = int(runtime.largest(max((part.shape[1] for part in parts), default=0)))
    tail = int(runtime.largest(max((part.shape[2] for part in parts if part.ndim == 3), default=0)))
    whole = torch.zeros((examples, width, tail) if tail else (examples, width), device=runtime.device)
    for indices, part in zip(rows, parts, strict=True):
        missing = width - part.shape[1]
        whole[indices] = pad(part, (0, 0, 0, missing) if part.ndim == 3 else (0, missing))
    return runtime.total(whole).detach()
