"""The formulas of training as pure functions: noise, losses, annealing (REKD sec. 3).

Shapes: B = batch, N = positions, C = classes. Every loss is a scalar tensor.

A draw is a hash of (seed, stage, purpose, step) and of the example's index and position. So the noise of an example
is the same however a batch is split over processes, and a resumed run draws what an uninterrupted one would have
drawn, without a generator's state. The hash is SplitMix64's finaliser, on any device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from rekd_train.config.run import SelectionConfig, TemperatureConfig

_WORD = (1 << 64) - 1


def _signed(word: int) -> int:
    return (word & _WORD ^ 1 << 63) - (1 << 63)


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_BITS = 23  # of a draw: (x + 1/2) / 2^23 is exact in float32 and never 0 or 1


def key(*numbers: int) -> int:
    """One 64-bit key from a sequence of integers."""
    state = 0
    for number in numbers:
        state = _mix((state + _GOLDEN) ^ number) & _WORD
    return state


def uniform_scalar(stream: int) -> float:
    """One draw from (0, 1) on the host."""
    return (_shifted(_mix(stream + _GOLDEN), 64 - _BITS) + 0.5) / (1 << _BITS)


def uniform(stream: int, examples: Tensor, width: int) -> Tensor:
    """Draws from (0, 1), (B, width) float32, for (B,) int64 indices of examples; padding changes no draw."""
    rows = _mix(examples * _GOLDEN + _signed(stream))
    bits = _mix(rows[:, None] + (torch.arange(width, device=examples.device) + 1) * _GOLDEN)
    return (_shifted(bits, 64 - _BITS).float() + 0.5) / (1 << _BITS)


def gumbel(stream: int, examples: Tensor, width: int) -> Tensor:
    """Standard Gumbel noise -log(-log U) for both choices of every position: (B, width, 2) float32."""
    return -torch.log(-torch.log(uniform(stream, examples, 2 * width).view(-1, width, 2)))


def _mix(state):
    """Of an int only the low 64 bits count; int64 tensors wrap around."""
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state, bits: int):
    """Logical shift to the right: torch's own keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def prediction_loss(class_logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of (B, C) logits, mean over the examples, not over their weights: the parts of a batch add up."""
    if weights is None:
        return cross_entropy(class_logits, labels)
    return (weights * cross_entropy(class_logits, labels, reduction="none")).mean()


def penalised_features(real: Tensor, positions: int, selection: SelectionConfig) -> Tensor:
    """N of the penalty, (B,) float32: real features, or the longest input's positions, whatever the batch's width."""
    return torch.full_like(real, positions, dtype=torch.float32) if selection.denominator == "all" else real.float()


def selection_penalty(
    kept: Tensor, features: Tensor, selection: SelectionConfig, examples: int,
    total: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:  # fmt: skip
    """L_select: how far the whole batch is from the target, as in the paper, or the mean over its examples.

    On shares (rate - target)^2, on counts (mean count - target N)^2. ``kept`` and ``features``: (B,) float, of this
    part of a batch with ``examples`` in all; ``total``: the sum over the parts.
    """
    if selection.penalty_per == "example":
        examples = 1
    else:
        kept, features = total(torch.stack([kept.sum(), features.sum()]))
    if selection.penalty_on == "counts":
        return ((kept - selection.target * features) / examples).square().mean()
    return (kept / features.clamp(min=1) - selection.target).square().mean()


def discontinuity(mask: Tensor, selectable: Tensor, columns: int | None) -> Tensor:
    """Neighbours of which one is kept and one is not, per feature, batch mean: what scatters a rationale costs.

    The coherence term of Lei, Barzilay and Jaakkola (Rationalizing Neural Predictions, 2016, sec. 3), on a grid of so
    many ``columns`` along both axes, otherwise along the line. Squared instead of absolute differences: equal for a
    mask of 0 and 1, and smooth. Only pairs within ``selectable`` (B, N) count.
    """
    shape = (-1, columns or mask.shape[1])
    kept, real = torch.where(selectable, mask, 0.0).unflatten(1, shape), selectable.unflatten(1, shape)
    changes: Tensor | int = 0
    for axis in (1, 2):
        pairs = real.shape[axis] - 1
        both = real.narrow(axis, 0, pairs) & real.narrow(axis, 1, pairs)
        changes = changes + torch.where(both, kept.diff(dim=axis).square(), 0.0).flatten(1).sum(dim=1)
    return (changes / selectable.sum(dim=1).clamp(min=1)).mean()


def rationale_distillation(teacher_log_soft: Tensor, student_log_soft: Tensor, selectable: Tensor) -> Tensor:
    """KL(teacher || student) of the select/skip choice, summed over selectable positions (B, N), batch mean.

    Both are (B, N, 2) log-probabilities.
    """
    divergence = kl_div(student_log_soft, teacher_log_soft, reduction="none", log_target=True).sum(dim=-1)
    return torch.where(selectable, divergence, 0.0).sum() / len(selectable)


def hard_rationale_distillation(teacher_mask: Tensor, student_log_soft: Tensor, selectable: Tensor) -> Tensor:
    """Cross-entropy of the student's choice against the teacher's (B, N) decision, summed over positions, batch mean.

    The student's side is its relaxed distribution, so a wrong choice has a gradient. (The authors' hard
    labels compare with the straight-through one-hot, which gives a wrong choice none.)
    """
    surprise = -student_log_soft.gather(-1, teacher_mask.to(torch.int64).unsqueeze(-1)).squeeze(-1)
    return torch.where(selectable, surprise, 0.0).sum() / len(selectable)


def prediction_distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(softmax(q_T / tau) || softmax(q_S / tau)), batch mean: (B, C) logits."""
    teacher = torch.log_softmax(teacher_logits / temperature, dim=-1)
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    return temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)


def mark_distillation(
    marks: Tensor, student_log_soft: Tensor, selectable: Tensor, smoothing: float, unmarked: float
) -> Tensor:
    """Cross-entropy of the student's choice against marked passages, summed over positions, batch mean.

    Args:
        marks: (B, N) weight of the passage that a token lies in, 0 in none; NaN: nothing was marked in this text.
        student_log_soft: (B, N, 2) log-probabilities.
        selectable: (B, N) bool.
        smoothing: chance that a mark, or its lack, is wrong.
        unmarked: weight of tokens that are in no passage: people and models mark what is enough, not all that matters.
    """
    known = selectable & ~marks.isnan()
    weight = marks.nan_to_num()
    wanted = torch.where(weight > 0, 1 - smoothing, smoothing)
    surprise = -(wanted * student_log_soft[..., 1] + (1 - wanted) * student_log_soft[..., 0])
    return torch.where(known, torch.where(weight > 0, weight, unmarked) * surprise, 0.0).sum() / len(selectable)


def annealed_temperature(progress: float, settings: TemperatureConfig) -> float:
    """tau = tau_0 (tau_K / tau_0)^progress (REKD sec. 3.2)."""
    return settings.start * (settings.end / settings.start) ** progress


def annealed_alpha(progress: float, settings: TemperatureConfig) -> float:
    """alpha = (tau_0 - tau) / (tau_0 - tau_K): from pure distillation to pure rationale extraction."""
    whole = settings.start - settings.end
    return (settings.start - annealed_temperature(progress, settings)) / whole if whole else 1.0


def refreshed_step(step: int, refresh: int) -> int:
    """The step whose temperature the step ``step`` (from 0) takes: it changes every ``refresh`` steps.

    The authors count steps from 1 and change it in those that ``refresh`` divides. With 1 each step takes its own.
    """
    return step if refresh == 1 else step + 1 - (step + 1) % refresh
