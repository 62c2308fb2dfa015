"""A frozen teacher's targets, computed once for a training split and reused in every epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rekd_train.data import Split, bucketed_batches
from rekd_train.evaluation import to_tensors
from rekd_train.models.rationalizer import Rationalizer

if TYPE_CHECKING:
    from rekd_train.training import Batch


class TeacherOutputs:
    """Selector logits and, on the teacher's own noise-free mask, class logits of every example."""

    def __init__(self, selector_logits: Tensor, class_logits: Tensor, lengths: np.ndarray) -> None:
        self._selector_logits = selector_logits
        self._class_logits = class_logits
        self._lengths = lengths

    def selector_logits(self, batch: Batch) -> Tensor:
        """(B, N, 2) float32 of the batch's examples."""
        width = int(self._lengths[batch.indices].max())
        return self._selector_logits[torch.from_numpy(batch.indices), :width].to(batch.labels.device)

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C) float32 of the batch's examples."""
        return self._class_logits[torch.from_numpy(batch.indices)].to(batch.labels.device)


@torch.inference_mode()
def run_teacher(teacher: Rationalizer, split: Split, batch_size: int = 128) -> TeacherOutputs:
    """One pass of the teacher over a split."""
    teacher.eval()
    device = next(teacher.parameters()).device
    selector_logits = torch.zeros(len(split), int(split.lengths.max()), 2)
    class_logits = torch.zeros(len(split), len(teacher.labels))
    for indices in bucketed_batches(split.lengths, batch_size):
        inputs = to_tensors(split.inputs(indices), device)
        logits = teacher.selector_logits(inputs)
        rows = torch.from_numpy(indices)
        selector_logits[rows, : logits.shape[1]] = logits.cpu()
        mask = teacher.select(inputs).mask
        class_logits[rows] = teacher.class_logits(inputs, mask).cpu()
    return TeacherOutputs(selector_logits, class_logits, split.lengths)
