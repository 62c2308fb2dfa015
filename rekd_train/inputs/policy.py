"""From selector scores to the mask: the decision rule that is part of the model.

Specification, for one example with scores d (N,), d = z1 - z0 in float32, and selectable positions s:

1. n = number of selectable positions.
2. budget K = clamp(floor(budget * n), minimum, capacity); no budget: K = n.
   ``floor`` is computed in integers (parts per million), so every runtime agrees on it.
3. ranked: the K selectable positions with the highest d; equal scores: the lower index first.
4. chosen: ranked positions with d + bias > 0; bias None: all ranked positions.
5. the first ``minimum`` ranked positions are chosen in any case.

No noise anywhere. ``mask_by_specification`` below is the slow, obvious form in NumPy; the torch form
(``rekd_train.models.base.apply_policy``) is what runs and what is exported, and tests hold them equal.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

_MILLION = 1_000_000


class SelectionPolicy(BaseModel):
    """The stored decision rule of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bias: float | None = Field(0.0, description="added to every score before the threshold at 0; None: no threshold")
    budget: float | None = Field(0.15, gt=0, le=1, description="hard upper limit, share of selectable features; None: "
                                 "no limit")
    minimum: int = Field(1, ge=0, description="least features kept of any input that has that many")
    selectable: Literal["real", "all"] = Field("real", description="'real': no padding, no special token; 'all': every "
                                               "position, as the paper's code does")

    @property
    def keeps_everything(self) -> bool:
        """Whether it has no threshold and no limit: the rule of a plain classifier, whose selector decides nothing."""
        return self.bias is None and self.budget is None

    @property
    def budget_parts_per_million(self) -> int | None:
        """The budget as an integer, so that the product with n is exact."""
        return None if self.budget is None else round(self.budget * _MILLION)

    def capacity(self, features: int) -> int:
        """K: most features that any input with at most ``features`` selectable ones can keep."""
        parts = self.budget_parts_per_million
        if parts is None:
            return features
        return min(max(features * parts // _MILLION, self.minimum, 1), features)

    def limits(self, selectable_counts: np.ndarray) -> np.ndarray:
        """Budget of each example in features: (B,) int64 from (B,) int64."""
        if self.budget is None:
            return selectable_counts
        shares = selectable_counts * self.budget_parts_per_million // _MILLION
        return np.minimum(np.maximum(shares, self.minimum), selectable_counts)


PAPER_POLICY = SelectionPolicy(bias=0.0, budget=None, minimum=0, selectable="all")
"""Argmax over every position without a limit, as the paper's code decides once its noise is removed."""


def mask_by_specification(scores: np.ndarray, selectable: np.ndarray, policy: SelectionPolicy) -> np.ndarray:
    """The rule above, written out position by position: (B, N) bool from (B, N) float32 and (B, N) bool."""
    mask = np.zeros(scores.shape, dtype=bool)
    for row in range(len(scores)):
        candidates = [int(i) for i in np.flatnonzero(selectable[row])]
        ranked = sorted(candidates, key=lambda i: (-scores[row, i], i))
        limit = int(policy.limits(np.array([len(candidates)]))[0])
        for rank, position in enumerate(ranked[:limit]):
            above = policy.bias is None or np.float32(scores[row, position]) + np.float32(policy.bias) > 0
            mask[row, position] = above or rank < policy.minimum
    return mask


def cut_margins(scores: np.ndarray, selectable: np.ndarray, policy: SelectionPolicy) -> np.ndarray:
    """Distance of each selectable score from the one value at which its own decision turns, the others unchanged.

    For parity checks: a flipped position is a near-tie when its margin is within the tolerance. A position is kept
    from a single cut upwards: the threshold or the last score within the budget, whichever is higher, and never above
    the last score that the minimum grants.

    Returns (B, N) float32; infinity where a position is not selectable or no score would change its decision.
    """
    margins = np.full(scores.shape, np.inf, dtype=np.float32)
    threshold = -np.inf if policy.bias is None else -np.float32(policy.bias)
    for row in range(len(scores)):
        candidates = np.flatnonzero(selectable[row])
        ordered = np.sort(scores[row, candidates])[::-1]
        limit = int(policy.limits(np.array([len(candidates)]))[0])
        for position in candidates:
            score = scores[row, position]
            within_budget = _entry_score(ordered, score, limit)
            within_minimum = _entry_score(ordered, score, policy.minimum)
            margins[row, position] = abs(score - min(within_minimum, max(within_budget, threshold)))
    return margins


def _entry_score(ordered: np.ndarray, score: np.floating, kept: int) -> float:
    """Score to beat to be among the first ``kept``; ``ordered`` descends and holds ``score`` itself."""
    if kept <= 0:
        return np.inf
    if kept >= len(ordered):
        return -np.inf
    # among the others: a score that is kept leaves room for the first one that is not
    return float(ordered[kept] if score >= ordered[kept - 1] else ordered[kept - 1])
