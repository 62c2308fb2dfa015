"""The losses as pure functions (REKD sec. 3).

Shapes: B = batch, N = positions, C = classes. Every function returns a scalar tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def rate_penalty(mask: Tensor, selectable: Tensor, target: float) -> Tensor:
    """(r - target)^2 with r = kept / selectable features over the whole batch.

    Args:
        mask: (B, N) float, carries the selector's gradient.
        selectable: (B, N) bool.
        target: wanted share.
    """
    weights = selectable.to(mask.dtype)
    rate = (mask * weights).sum() / weights.sum().clamp(min=1)
    return (rate - target).square()


def prediction_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, batch mean: (B, C) logits against (B,) int64 labels."""
    return cross_entropy(class_logits, labels)


def rationale_distillation(teacher_log_soft: Tensor, student_log_soft: Tensor, selectable: Tensor) -> Tensor:
    """KL(teacher || student) of the select/skip choice, summed over selectable positions, batch mean.

    Args:
        teacher_log_soft: (B, N, 2) log-probabilities.
        student_log_soft: (B, N, 2) log-probabilities.
        selectable: (B, N) bool.
    """
    divergence = kl_div(student_log_soft, teacher_log_soft, reduction="none", log_target=True).sum(dim=-1)
    return torch.where(selectable, divergence, 0.0).sum() / len(selectable)


def prediction_distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(q_T / tau) || softmax(q_S / tau)), batch mean: (B, C) logits."""
    teacher = torch.log_softmax(teacher_logits / temperature, dim=-1)
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    return temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)
