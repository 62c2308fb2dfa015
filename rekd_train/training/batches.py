"""A training split as batches on the device, in an order that depends on seed, stage and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from rekd_train.data import Split, bucketed_batches
from rekd_train.inputs.preprocessors import Preprocessor, full_length
from rekd_train.training.noise import key
from rekd_train.training.runtime import Runtime


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
        seed: of the stage: a ``noise.key``.
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
