"""What a frozen teacher pair says about a batch: remembered from one pass, or asked anew each time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from rekd_train.config.run import RunConfig
from rekd_train.data import Split, bucketed_batches
from rekd_train.models.gates import apply_policy, selection_scores
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.batches import Batch
from rekd_train.training.runtime import Runtime


class Teacher(Protocol):
    """A frozen pair. B = batch, N = positions of the batch, C = classes."""

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32."""

    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool: the rationale by the teacher's stored policy."""

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32 on the teacher's own rationale."""

    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """(B, C) float32 on another mask (B, N)."""


class LiveTeacher:
    """Asks the pair in every step: for augmented data.

    Args:
        pair: on the runtime's device.
    """

    def __init__(self, pair: Rationalizer, runtime: Runtime, precision: str) -> None:
        self._pair, self._runtime, self._precision = pair.eval(), runtime, precision
        self._answered: Batch | None = None
        self._logits = self._mask = None

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32."""
        return self._read(batch)[0][:, :positions]

    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool."""
        return self._read(batch)[1][:, :positions]

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32."""
        return self.class_logits_on(batch, self._read(batch)[1])

    @torch.no_grad()
    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """(B, C) float32."""
        with self._runtime.autocast(self._precision):
            return self._pair.class_logits(batch.inputs, mask.detach()).float()

    @torch.no_grad()
    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._answered is not batch:
            with self._runtime.autocast(self._precision):
                self._logits = self._pair.selector_logits(batch.inputs).float()
            self._mask = rule_mask(self._pair, batch.inputs, self._logits)
            self._answered = batch
        return self._logits, self._mask


class CachedTeacher:
    """Remembers the pair's answers on its own rationales for a whole split, on the runtime's device."""

    def __init__(self, live: LiveTeacher, selector_logits: Tensor, mask: Tensor, class_logits: Tensor) -> None:
        self._live = live
        self._selector_logits, self._mask, self._class_logits = selector_logits, mask, class_logits

    def selector_logits(self, batch: Batch, positions: int) -> Tensor:
        """(B, N, 2) float32."""
        return self._selector_logits[batch.indices][:, :positions]

    def mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool."""
        return self._mask[batch.indices][:, :positions]

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32."""
        return self._class_logits[batch.indices]

    def class_logits_on(self, batch: Batch, mask: Tensor) -> Tensor:
        """(B, C) float32."""
        return self._live.class_logits_on(batch, mask)


def teacher_for(pair: Rationalizer, split: Split, config: RunConfig, runtime: Runtime) -> Teacher:
    """The pair as a teacher over a training split: cached where the examples stay the same."""
    acceleration = config.acceleration
    live = LiveTeacher(pair.to(runtime.device), runtime, acceleration.precision)
    if not acceleration.teacher_cache or split.augmented:
        return live
    logits, mask, classes = [], [], []
    rows = []
    for batch in all_batches(split, runtime, share_out=True):
        with torch.inference_mode(), runtime.autocast(acceleration.precision):
            found = pair.selector_logits(batch.inputs).float()
            chosen = rule_mask(pair, batch.inputs, found)
            classes.append(pair.class_logits(batch.inputs, chosen).float())
        rows.append(batch.indices)
        logits.append(found)
        mask.append(chosen)
    return CachedTeacher(
        live,
        collected(rows, logits, len(split), runtime),
        collected(rows, mask, len(split), runtime).bool(),
        collected(rows, classes, len(split), runtime),
    )


def rule_mask(pair: Rationalizer, inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """(B, N) bool by the pair's stored policy from its selector's logits (B, N, 2)."""
    return apply_policy(selection_scores(logits), pair.selectable(inputs), pair.policy, pair.capacity)


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


def collected(rows: list[Tensor], parts: list[Tensor], examples: int, runtime: Runtime) -> Tensor:
    """Answers of batches, also of those that other processes read, in the split's order.

    Args:
        rows: (B,) indices of each batch.
        parts: (B, M) or (B, M, K) of each batch; shorter M are filled with 0.

    Returns:
        (examples, longest M, K) float32 on the device; float32 for bool parts, too.
    """
    width = int(runtime.largest(max((part.shape[1] for part in parts), default=0)))
    tail = int(runtime.largest(max((part.shape[2] for part in parts if part.ndim == 3), default=0)))
    shape = (examples, width, tail) if tail else (examples, width)
    whole = torch.zeros(shape, device=runtime.device)
    for indices, part in zip(rows, parts, strict=True):
        missing = width - part.shape[1]
        filled = pad(part.float(), (0, 0, 0, missing) if part.ndim == 3 else (0, missing))
        whole[indices] = filled
    return runtime.total(whole).detach()
