"""Where a run computes: device, precision and processes, by ``accelerate``.

Several processes (``accelerate launch``, ``torchrun``) share every batch: each computes its part, gradients
are averaged by DistributedDataParallel. An objective therefore returns its *part* of the loss such that the
parts add up to the loss of the whole batch, and sums that enter a loss go through ``total``.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from rekd_train.errors import ConfigError


class Runtime:
    """Device and processes.

    Args:
        device: 'auto' (a GPU if there is one; this process's, if there are several), 'cpu', 'cuda', 'cuda:1'.

    Raises:
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

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module whose forward is called in training; several processes average its gradients."""
        return self._accelerator.prepare_model(objective) if self.processes > 1 else objective

    def release(self) -> None:
        """Let go of wrapped objectives: their hooks would average the gradients of the next stage, too."""
        if self.processes > 1:
            self._accelerator.free_memory()

    def autocast(self, precision: str) -> AbstractContextManager:
        """Matrix products in bf16 if the precision ('auto', 'fp32', 'bf16') says so for this device."""
        launched = self._accelerator is not None and self._accelerator.mixed_precision == "bf16"
        if precision == "auto":
            # a GPU that only emulates bf16 is slower with it
            native = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            enabled = launched or native
        else:
            enabled = precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def part(self, indices: np.ndarray) -> np.ndarray:
        """This process's examples of a global batch, in order; may be empty."""
        return indices[self.rank :: self.processes]

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes; backward, the gradient of the whole reaches each process's own summand."""
        if self.processes == 1:
            return value
        own = value.detach()
        return value + (self._accelerator.reduce(own, "sum") - own)

    def shared(self, value: Tensor) -> Tensor:
        """The part, in a sum over processes, of a value that all of them compute alike from totals.

        Its gradient is whole: each process differentiates its own summand of the totals only.
        """
        return value - value.detach() * (1 - 1 / self.processes) if self.processes > 1 else value

    def agreed(self, value: float) -> float:
        """The main process's number, so that all processes decide alike."""
        if self.processes == 1:
            return value
        own = value if self.is_main else 0.0
        return float(self._accelerator.reduce(torch.tensor(own, dtype=torch.float64, device=self.device), "sum"))

    def largest(self, value: float) -> float:
        """The largest of the processes' numbers."""
        if self.processes == 1:
            return value
        own = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self._accelerator.gather(own).max())

    def wait(self) -> None:
        """Until every process is here."""
        if self.processes > 1:
            self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group of processes, all together: what follows is the main one's, and no other waits for it.

        A process that waits runs into the communication's time-out (ten minutes with NCCL).
        """
        if self.processes > 1:
            self.wait()
            self._accelerator.end_training()

    def to_device(self, array: np.ndarray) -> Tensor:
        """A tensor on the device; a copy to a GPU of NVIDIA's is not waited for."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def chosen_device(name: str | torch.device) -> torch.device:
    """'cpu', 'cuda' or another of torch's names; 'auto': a GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"there is no device '{name}' here; fix: --device cpu") from None
    return device
