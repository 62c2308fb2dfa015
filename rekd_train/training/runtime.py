"""Where a run computes (device, precision and processes, by ``accelerate``), and its batches there.

Several processes (``accelerate launch``, ``torchrun``) share every batch: each computes its part, gradients
are averaged by DistributedDataParallel. An objective therefore returns its *part* of the loss such that the
parts add up to the loss of the whole batch, and sums that enter a loss go through ``total``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor, nn
from torch.nn.functional import pad

from rekd_train.config.run import RunConfig
from rekd_train.data import Split, bucketed_batches
from rekd_train.data.examples import UNLABELLED
from rekd_train.errors import ConfigError
from rekd_train.inputs.preprocessors import Preprocessor, full_length
from rekd_train.training.losses import key


class Runtime:
    """Device ('auto': a GPU if there is one; this process's, if there are several) and processes.

    ConfigError: the device is not there.
    """

    def __init__(self, device: str | torch.device = "auto") -> None:
        self._accelerator = None
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several or str(device) == "auto":
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=str(device) == "cpu" or not torch.cuda.is_available())
            self.device = self._accelerator.device
        else:
            self.device = chosen_device(device)
        self.processes = self._accelerator.num_processes if several else 1
        self.rank = self._accelerator.process_index if several else 0
        self.is_main = self.rank == 0
        """Whether this process writes files and talks."""
        # moments of words that are not seen again shrink into numbers so small that a CPU takes ten times as long
        torch.set_flush_denormal(True)

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module whose forward is called in training; several processes average its gradients."""
        return self._accelerator.prepare_model(objective) if self.processes > 1 else objective

    def release(self) -> None:
        """Release wrapped objectives: their hooks would average the gradients of the next stage, too."""
        if self.processes > 1:
            self._accelerator.free_memory()

    def autocast(self, precision: str) -> AbstractContextManager:
        """Matrix products in bf16 if the precision ('auto', 'fp32', 'bf16') says so for this device."""
        enabled = precision == "bf16"
        if precision == "auto":
            launched = self._accelerator is not None and self._accelerator.mixed_precision == "bf16"
            # a GPU that only emulates bf16 is slower with it
            native = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            enabled = launched or native
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def part(self, indices: np.ndarray) -> np.ndarray:
        """This process's examples of a global batch, in order; may be empty."""
        return indices[self.rank :: self.processes]

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes; backward, the gradient of the whole reaches each process's own summand."""
        own = value.detach()
        return value if self.processes == 1 else value + (self._accelerator.reduce(own, "sum") - own)

    def shared(self, value: Tensor) -> Tensor:
        """This process's part of a value that all compute from totals; its gradient is whole, as ``total``'s is."""
        return value - value.detach() * (1 - 1 / self.processes) if self.processes > 1 else value

    def gathered(self, value: float) -> list[float]:
        """Every process's number, the main one's first."""
        if self.processes == 1:
            return [value]
        return self._accelerator.gather(torch.tensor([value], dtype=torch.float64, device=self.device)).tolist()

    def wait(self) -> None:
        """Until every process is here."""
        if self.processes > 1:
            self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group of processes, all together: one that waits for the main one's work would time out."""
        if self.processes > 1:
            self.wait()
            self._accelerator.end_training()

    def to_device(self, array: np.ndarray) -> Tensor:
        """A tensor on the device; a copy to a GPU of NVIDIA's is not waited for."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def chosen_device(name: str | torch.device) -> torch.device:
    """'cpu', 'cuda' or another of torch's names; 'auto': a GPU if there is one; ConfigError: it is not here."""
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"there is no device '{name}' here; fix: --device cpu") from None
    return device


@dataclass
class Batch:
    """One process's part of a training step's examples."""

    indices: Tensor  # (B,) int64, of each example in its split
    inputs: dict[str, Tensor]
    labels: Tensor  # (B,) int64
    step: int
    steps: int  # of the stage
    examples: int  # of the whole batch, over all processes
    present: int  # examples of this part; 0 if it is empty: then one example stands in, which must not count
    weights: Tensor | None = None  # (B,) float32, of the examples in the cross-entropy; None: all 1

    @property
    def share(self) -> float:
        """This part's examples / the whole batch's."""
        return self.present / self.examples


def example_weights(labels: np.ndarray, class_weights: str) -> np.ndarray | None:
    """(n,) float32, of the examples in the cross-entropy: n / (classes * examples of the class); 'none': None.

    Examples without a label weigh nothing.
    """
    labelled = labels != UNLABELLED
    if class_weights == "none":
        return None if labelled.all() else labelled.astype(np.float32)
    weights = np.zeros(len(labels), dtype=np.float32)
    weights[labelled] = compute_sample_weight(class_weights, labels[labelled])
    return weights


class FullLength:
    """A split of texts whose batches are all padded to the longest input: for policies that may select padding."""

    augmented, truth = False, None

    def __init__(self, split: Split, preprocessor: Preprocessor) -> None:
        self._split, self._preprocessor = split, preprocessor
        self.labels, self.lengths = split.labels, split.lengths

    def __len__(self) -> int:
        return len(self._split)

    def inputs(self, indices: Sequence[int], generator: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The batch, as wide as the preprocessing allows."""
        return full_length(self._split.inputs(indices), self._preprocessor)


class Batches:
    """All batches of a stage of ``steps`` steps; ``seed``: of the stage, a ``losses.key``."""

    def __init__(self, config: RunConfig, split: Split, steps: int, seed: int, runtime: Runtime) -> None:
        self._split, self._steps, self._seed, self._runtime = split, steps, seed, runtime
        self._size = config.optimisation.batch_size
        self._lengths = split.lengths if config.acceleration.length_buckets else np.zeros(len(split), dtype=np.int64)
        self._weights = example_weights(split.labels, config.data.class_weights)
        self.per_epoch = -(-len(split) // self._size)

    def starting_at(self, first: int) -> Iterator[Batch]:
        """Batches of the steps from ``first`` on."""
        for epoch in range(first // self.per_epoch, -(-self._steps // self.per_epoch)):
            order = bucketed_batches(self._lengths, self._size, np.random.default_rng([self._seed, epoch]))
            for step, indices in enumerate(order, epoch * self.per_epoch):
                if first <= step < self._steps:
                    yield self._batch(indices, step)

    def _batch(self, indices: np.ndarray, step: int) -> Batch:
        runtime, part = self._runtime, self._runtime.part(indices)
        own = part if len(part) else indices[:1]
        if self._split.augmented:
            # of the whole batch, whoever computes which part: so the images do not depend on the partition
            whole = self._split.inputs(indices, np.random.default_rng(key(self._seed, step)))
            rows = runtime.part(np.arange(len(indices))) if len(part) else [0]
            arrays = {name: array[rows] for name, array in whole.items()}
        else:
            arrays = self._split.inputs(own)
        weights = None if self._weights is None else runtime.to_device(self._weights[own])
        return _batch(runtime, self._split, own, arrays, step, self._steps, len(indices), len(part), weights)


def all_batches(split: Split, runtime: Runtime) -> Iterator[Batch]:
    """Every example once, as it is, in batches of similar length, of which each process has its share."""
    for number, indices in enumerate(bucketed_batches(split.lengths, 128)):
        if number % runtime.processes == runtime.rank:
            yield _batch(runtime, split, indices, split.inputs(indices), number, 1, len(indices), len(indices))


def _batch(runtime: Runtime, split: Split, indices: np.ndarray, arrays: dict[str, np.ndarray], *rest) -> Batch:
    inputs = {name: runtime.to_device(array) for name, array in arrays.items()}
    return Batch(runtime.to_device(indices), inputs, runtime.to_device(split.labels[indices].clip(min=0)), *rest)


def run_frozen(
    split: Split, runtime: Runtime, precision: str, forward: Callable[[Batch], Sequence[Tensor]], count: int
) -> list[Tensor]:
    """The outputs of a frozen model for every example as it is, in the split's order; processes share the work.

    ``forward`` makes ``count`` tensors (B, M) or (B, M, K) of a batch; each becomes (n, longest M, K) float32 on the
    device, filled up with 0.
    """
    rows: list[Tensor] = []
    parts: list[list[Tensor]] = [[] for _ in range(count)]  # also in a process that has no batch
    for batch in all_batches(split, runtime):
        with torch.inference_mode(), runtime.autocast(precision):
            for each, output in zip(parts, forward(batch), strict=True):
                each.append(output.float())
        rows.append(batch.indices)
    return [_collected(rows, each, len(split), runtime) for each in parts]


def _collected(rows: list[Tensor], parts: list[Tensor], examples: int, runtime: Runtime) -> Tensor:
    width = int(max(runtime.gathered(max((part.shape[1] for part in parts), default=0))))
    tail = int(max(runtime.gathered(max((part.shape[2] for part in parts if part.ndim == 3), default=0))))
    whole = torch.zeros((examples, width, tail) if tail else (examples, width), device=runtime.device)
    for indices, part in zip(rows, parts, strict=True):
        missing = width - part.shape[1]
        whole[indices] = pad(part, (0, 0, 0, missing) if part.ndim == 3 else (0, missing))
    return runtime.total(whole).detach()
