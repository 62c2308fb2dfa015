"""The masks to measure: what each way of deciding keeps, and the baselines that keep equally much."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.models.gates import apply_policy

ARGMAX = SelectionPolicy(bias=0.0, budget=None, minimum=0)
"""z1 > z0 and nothing else: the mode of the trained sampler."""


def decide(scores: Tensor, selectable: Tensor, policy: SelectionPolicy) -> Tensor:
    """The noise-free mask of any policy: (n, N) bool from (n, N) float32 scores and (n, N) bool."""
    return apply_policy(scores, selectable, policy, policy.capacity(scores.shape[1]))


def fill(scores: Tensor, selectable: Tensor, share: float, minimum: int = 1) -> Tensor:
    """Exactly the budget: the floor(share * n) highest scores of each example, at least ``minimum``: (n, N) bool."""
    return decide(scores, selectable, SelectionPolicy(bias=None, budget=share, minimum=minimum))


def drawn(scores: Tensor, selectable: Tensor, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Sampled rationales, as training and the authors' evaluation draw them.

    z1 + G1 > z0 + G0 with independent Gumbel noise, which is d + logistic noise > 0: P(keep) = sigmoid(d) at
    every temperature. No budget holds.

    Yields:
        (n, N) bool, ``draws`` times.
    """
    for _ in range(draws):
        uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
        yield selectable & (scores + torch.logit(uniform, eps=1e-12) > 0)


def random_like(mask: Tensor, selectable: Tensor, generator: torch.Generator) -> Tensor:
    """As many features of each example as ``mask`` keeps, uniformly at random: (n, N) bool."""
    return _best(torch.rand(mask.shape, generator=generator), selectable, mask.sum(dim=1))


def first_like(mask: Tensor, selectable: Tensor) -> Tensor:
    """As many features of each example as ``mask`` keeps, the first ones: (n, N) bool."""
    return selectable & (selectable.to(torch.int64).cumsum(dim=1) <= mask.sum(dim=1, keepdim=True))


def _best(values: Tensor, selectable: Tensor, counts: Tensor) -> Tensor:
    ranked = values.masked_fill(~selectable, -1).argsort(dim=1, descending=True, stable=True)
    places = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(values.shape[1]).expand_as(ranked).contiguous())
    return selectable & (places < counts[:, None])
