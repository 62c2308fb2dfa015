"""The losses as pure functions (REKD sec. 3), and the quantities in them that are annealed.

Shapes: B = batch, N = positions, C = classes. Every loss is a scalar tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, nll_loss

from rekd_train.config.run import TemperatureConfig


def prediction_loss(class_logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, batch mean: (B, C) logits against (B,) int64 labels.

    Args:
        weights: (B,) float, of the examples; None: all 1. The mean is over the examples, not over their weights, so
            that the losses of a batch's parts add up.
    """
    if weights is None:
        return cross_entropy(class_logits, labels)
    return (weights * cross_entropy(class_logits, labels, reduction="none")).mean()


def batch_penalty(kept: Tensor, features: Tensor, target: float, examples: int | None = None) -> Tensor:
    """How far a whole batch is from the target: the paper's, which leaves each example free.

    Args:
        kept: scalar, features kept in the batch; carries the selector's gradient.
        features: scalar, features of the batch.
        target: wanted share.
        examples: None: (r - target)^2 on shares; a number: (mean count - target N)^2 on counts.
    """
    if examples is None:
        return (kept / features.clamp(min=1) - target).square()
    return ((kept - target * features) / examples).square()


def example_penalty(kept: Tensor, features: Tensor, target: float, on_counts: bool) -> Tensor:
    """How far each example is from the target, batch mean.

    Args:
        kept: (B,) float, features kept; carries the selector's gradient.
        features: (B,) float.
        target: wanted share.
        on_counts: (count - target N)^2; otherwise (rate - target)^2.
    """
    if on_counts:
        return (kept - target * features).square().mean()
    return (kept / features.clamp(min=1) - target).square().mean()


def discontinuity(mask: Tensor, selectable: Tensor, columns: int | None) -> Tensor:
    """Neighbours of which one is kept and one is not, per feature, batch mean: what scatters a rationale costs.

    The coherence term of Lei, Barzilay and Jaakkola (Rationalizing Neural Predictions, 2016, sec. 3), on a
    grid along both axes. Squared instead of absolute differences: equal for a mask of 0 and 1, and smooth.

    Args:
        mask: (B, N) float, carries the selector's gradient.
        selectable: (B, N) bool; pairs with a position that is not selectable do not count.
        columns: features in each row of a grid; None: the features are one line.
    """
    kept = torch.where(selectable, mask, 0.0)
    if columns is None:
        axes = [(kept[:, 1:] - kept[:, :-1], selectable[:, 1:] & selectable[:, :-1])]
    else:
        grid, real = (value.unflatten(1, (-1, columns)) for value in (kept, selectable))
        axes = [
            (grid[:, 1:] - grid[:, :-1], real[:, 1:] & real[:, :-1]),
            (grid[:, :, 1:] - grid[:, :, :-1], real[:, :, 1:] & real[:, :, :-1]),
        ]
    changes = sum(torch.where(both, difference.square(), 0.0).flatten(1).sum(dim=1) for difference, both in axes)
    return (changes / selectable.sum(dim=1).clamp(min=1)).mean()


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


def rationale_imitation(teacher_mask: Tensor, student_log_soft: Tensor, selectable: Tensor) -> Tensor:
    """Cross-entropy of the student's choice against the teacher's decision, summed over positions, batch mean.

    The student's side is its relaxed distribution, so a wrong choice has a gradient. (The authors' hard
    labels compare with the straight-through one-hot, which gives a wrong choice none.)

    Args:
        teacher_mask: (B, N) bool.
        student_log_soft: (B, N, 2) log-probabilities.
        selectable: (B, N) bool.
    """
    surprise = -student_log_soft.gather(-1, teacher_mask.to(torch.int64).unsqueeze(-1)).squeeze(-1)
    return torch.where(selectable, surprise, 0.0).sum() / len(selectable)


def prediction_imitation(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Cross-entropy against the teacher's label, batch mean: (B, C) logits."""
    return nll_loss(torch.log_softmax(student_logits, dim=-1), teacher_logits.argmax(dim=-1))


def annealed_temperature(progress: float, settings: TemperatureConfig) -> float:
    """tau = tau_0 (tau_K / tau_0)^progress (REKD sec. 3.2)."""
    return settings.start * (settings.end / settings.start) ** progress


def refreshed_step(step: int, refresh: int) -> int:
    """The step whose temperature the step ``step`` (from 0) takes: it changes every ``refresh`` steps.

    The authors count steps from 1 and change it in those that ``refresh`` divides, so the first refresh - 1 steps
    run at tau_0. With a refresh of 1 each step takes its own, from tau_0 on.
    """
    return step if refresh == 1 else step + 1 - (step + 1) % refresh


def annealed_alpha(progress: float, settings: TemperatureConfig) -> float:
    """alpha = (tau_0 - tau) / (tau_0 - tau_K): from pure distillation to pure rationale extraction."""
    if settings.start == settings.end:
        return 1.0
    return (settings.start - annealed_temperature(progress, settings)) / (settings.start - settings.end)


