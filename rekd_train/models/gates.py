"""The two ways from selector logits to a mask: a noisy one to learn with, a noise-free one to use.

Learning: straight-through Gumbel-softmax (REKD sec. 3; the authors' code). Using: the stored
``SelectionPolicy``, in operations that ONNX Runtime and TensorRT run alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rekd_train.inputs.policy import SelectionPolicy


class Gate(NamedTuple):
    """A drawn mask and the distribution it was drawn from."""

    mask: Tensor
    """(B, N) float32, exactly 0 or 1 forward; backward it passes the gradient to ``log_soft`` (straight through)."""
    log_soft: Tensor
    """(B, N, 2) float32, log of the relaxed choice; index 1 = select."""


def relaxed_log_choice(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """log softmax((Z + G) / tau): (B, N, 2) from (B, N, 2). ``noise`` None means G = 0."""
    noisy = logits if noise is None else logits + noise
    return torch.log_softmax(noisy / temperature, dim=-1)


def straight_through_gate(logits: Tensor, temperature: float, noise: Tensor | None) -> Gate:
    """Hard mask forward, relaxed gradient backward: y = (y_hard - S).detach() + S (REKD sec. 3.2)."""
    log_soft = relaxed_log_choice(logits, temperature, noise)
    soft = log_soft[..., 1].exp()
    hard = (log_soft[..., 1] > log_soft[..., 0]).to(soft.dtype)
    return Gate(mask=(hard - soft).detach() + soft, log_soft=log_soft)


def selection_scores(logits: Tensor) -> Tensor:
    """d = z1 - z0 in float32: (B, N) from (B, N, 2)."""
    logits = logits.float()
    return logits[..., 1] - logits[..., 0]


def apply_policy(scores: Tensor, selectable: Tensor, policy: SelectionPolicy, capacity: int) -> Tensor:
    """The decision rule of ``rekd_train.inputs.policy``, exportable: fixed shapes, no sort order relied on.

    Only the *values* of a top-k are used; ties at the cut are resolved by a running count over the
    positions, so the lower index wins on every runtime.

    Args:
        scores: (B, N) float32.
        selectable: (B, N) bool.
        capacity: most features that can be kept, ``policy.capacity(longest input)``.

    Returns:
        (B, N) bool.
    """
    above_threshold = selectable if policy.bias is None else selectable & (scores + policy.bias > 0)
    if policy.budget is None and policy.minimum == 0:
        return above_threshold
    counts = selectable.to(torch.int64).sum(dim=1, keepdim=True)
    ranked_values = _ranked_values(scores, selectable, max(capacity, policy.minimum))
    mask = above_threshold
    if policy.budget is not None:
        # a count of whole steps instead of a division: exporters divide integers as float32, which rounds
        steps = torch.arange(1, max(capacity, policy.minimum) + 1, device=scores.device) * 1_000_000
        shares = (steps <= counts * policy.budget_parts_per_million).to(torch.int64).sum(dim=1, keepdim=True)
        limits = torch.minimum(shares.clamp(min=policy.minimum), counts)
        mask = mask & _highest(scores, selectable, ranked_values, limits)
    if policy.minimum > 0:
        mask = mask | _highest(scores, selectable, ranked_values, counts.clamp(max=policy.minimum))
    return mask


def _ranked_values(scores: Tensor, selectable: Tensor, count: int) -> Tensor:
    """The ``count`` highest selectable scores in descending order, padded with -inf: (B, count)."""
    lowest = torch.finfo(torch.float32).min
    candidates = torch.where(selectable, scores, lowest)
    # padding makes the top-k width independent of N, which stays symbolic in the exported graph
    padded = torch.nn.functional.pad(candidates, (0, count), value=lowest)
    return padded.topk(count, dim=1, sorted=True).values


def _highest(scores: Tensor, selectable: Tensor, ranked_values: Tensor, limits: Tensor) -> Tensor:
    """Mask of each row's ``limits`` (B, 1) best selectable positions, lower index first among equals."""
    cut = ranked_values.gather(1, (limits - 1).clamp(min=0))
    better = selectable & (scores > cut)
    equal = selectable & (scores == cut)
    places = limits - better.to(torch.int64).sum(dim=1, keepdim=True)
    return better | (equal & (equal.to(torch.int64).cumsum(dim=1) <= places))


def kept_positions(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Positions of the kept features, ascending, in ``capacity`` slots.

    Written as a comparison with a running count (slot k holds the first position whose count exceeds
    k), so there is no NonZero, no scatter and no data-dependent shape.

    Args:
        mask: (B, N) bool with at most ``capacity`` kept.

    Returns:
        positions (B, K) int64, 0 in unused slots; kept (B, K) bool, whether a slot is used.
    """
    counts = mask.to(torch.int64).cumsum(dim=1)
    slots = torch.arange(capacity, device=mask.device)
    positions = (counts[:, None, :] <= slots[None, :, None]).to(torch.int64).sum(dim=2)
    kept = slots[None, :] < counts[:, -1:]
    return torch.where(kept, positions, 0), kept
