"""Does the answer depend on the rationale? Comprehensiveness, sufficiency and their means over sizes.

Source: DeYoung et al. 2020 (ERASER), sec. 5 and its scorer. Probabilities go in; whose they are (the pair's own,
an independent judge's) is the caller's choice and must be said with every figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of the features over which AOPC is a mean, as the scorer's default."""


def comprehensiveness(full: np.ndarray, without_rationale: np.ndarray) -> np.ndarray:
    """p_j(x) - p_j(x without r), j the class predicted on the full input: (n,) from (n, C) twice. Higher is better."""
    return _loss_of_confidence(full, without_rationale)


def sufficiency(full: np.ndarray, rationale_alone: np.ndarray) -> np.ndarray:
    """p_j(x) - p_j(r), j the class predicted on the full input: (n,) from (n, C) twice. Lower is better."""
    return _loss_of_confidence(full, rationale_alone)


def area_over_perturbation_curve(by_size: Sequence[np.ndarray]) -> float:
    """AOPC: plain mean over rationale sizes, then over examples, of either figure: one (n,) for each size.

    Sizes that give the same mask as the one before are counted again, as the scorer does.
    """
    return float(np.mean(np.stack(list(by_size))))


def top_share(scores: np.ndarray, selectable: np.ndarray, share: float) -> np.ndarray:
    """The ceil(share * n) highest-scored selectable features of each example, at least 1; lower index first.

    Args:
        scores: (n, N).
        selectable: (n, N) bool.

    Returns:
        (n, N) bool.
    """
    mask = np.zeros(scores.shape, dtype=bool)
    ranked = np.argsort(np.where(selectable, -scores, np.inf), axis=1, kind="stable")
    for row, count in enumerate(selectable.sum(axis=1)):
        mask[row, ranked[row, : min(int(count), max(1, math.ceil(share * count - 1e-9)))]] = True
    return mask


def _loss_of_confidence(full: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    rows, predicted = np.arange(len(full)), full.argmax(axis=1)
    return full[rows, predicted] - reduced[rows, predicted]
