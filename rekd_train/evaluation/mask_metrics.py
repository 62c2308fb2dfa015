"""Figures about masks: how alike two are, how steady sampled ones are, how much of a known truth they hold."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from rekd_train.evaluation.metrics import ratio


def overlap(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Mean over examples of Jaccard |A and B| / |A or B| and of F1 2|A and B| / (|A| + |B|).

    Two empty masks are the same mask: 1.

    Args:
        first: (n, N) bool.
        second: (n, N) bool.
    """
    both = (first & second).sum(axis=1)
    either = (first | second).sum(axis=1)
    sizes = first.sum(axis=1) + second.sum(axis=1)
    same = sizes == 0
    return {
        "jaccard": float(np.mean(np.where(same, 1.0, both / np.maximum(either, 1)))),
        "f1": float(np.mean(np.where(same, 1.0, 2 * both / np.maximum(sizes, 1)))),
    }


def rank_correlation(first: np.ndarray, second: np.ndarray, selectable: np.ndarray) -> float:
    """Mean over examples of Spearman's rho of two scores over the selectable positions; ties share a rank.

    Examples with fewer than two positions or a constant score have no rho and are left out; nan if all are.

    Args:
        first: (n, N).
        second: (n, N).
        selectable: (n, N) bool.
    """
    found = []
    for a, b, where in zip(first, second, selectable, strict=True):
        ranks = rankdata(a[where]), rankdata(b[where])
        spread = [r - r.mean() for r in ranks]
        scale = np.sqrt(np.sum(spread[0] ** 2) * np.sum(spread[1] ** 2)) if len(ranks[0]) > 1 else 0.0
        if scale > 0:
            found.append(float(np.sum(spread[0] * spread[1]) / scale))
    return float(np.mean(found)) if found else float("nan")


def selection_divergence(teacher: np.ndarray, student: np.ndarray, selectable: np.ndarray) -> float:
    """Mean over selectable positions of KL(Bernoulli(sigmoid(d_T)) || Bernoulli(sigmoid(d_S))) in nats.

    The rationale term of distillation (REKD sec. 3.3) without noise at temperature 1, for each position.

    Args:
        teacher: (n, N) scores d.
        student: (n, N) scores d.
        selectable: (n, N) bool.
    """
    t, s = teacher[selectable].astype(np.float64), student[selectable].astype(np.float64)
    log_t, log_s = -np.logaddexp(0, -t), -np.logaddexp(0, -s)
    # log(1 - sigmoid(d)) = log sigmoid(d) - d
    return float(np.mean(np.exp(log_t) * (log_t - log_s) + np.exp(log_t - t) * ((log_t - t) - (log_s - s))))


def flip_rate(predicted: np.ndarray) -> float:
    """Chance that two draws of the same example's rationale give different classes.

    Args:
        predicted: (R, n) class numbers of R >= 2 draws.
    """
    draws = len(predicted)
    same = sum(np.sum(counts * (counts - 1)) for counts in ((predicted == c).sum(axis=0) for c in np.unique(predicted)))
    return float(1 - same / (draws * (draws - 1) * predicted.shape[1]))


def pairwise_jaccard(masks: np.ndarray) -> float:
    """Mean over examples and over pairs of draws of the Jaccard index of two masks; two empty ones: 1.

    Args:
        masks: (R, n, N) bool of R >= 2 draws.
    """
    pairs = [(a, b) for a in range(len(masks)) for b in range(a + 1, len(masks))]
    return float(np.mean([overlap(masks[a], masks[b])["jaccard"] for a, b in pairs]))


def truth_summary(mask: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How much of a rationale lies in a known truth, and how much of the truth it holds.

    Args:
        mask: (n, N) bool, kept features.
        truth: (n, N) bool, the features that carry the label.

    Returns:
        ``in_truth``: share of all kept features that lie in the truth; ``in_truth_mean``: mean of the examples'
        shares (an empty rationale: 0); ``truth_kept``: mean share of the truth that is kept; ``truth_size_used``:
        kept features / features of the truth.
    """
    both, kept, true = (mask & truth).sum(axis=1), mask.sum(axis=1), truth.sum(axis=1)
    return {
        "in_truth": ratio(both.sum(), kept.sum()),
        "in_truth_mean": float(np.mean(both / np.maximum(kept, 1))),
        "truth_kept": float(np.mean(both / np.maximum(true, 1))),
        "truth_size_used": ratio(kept.sum(), true.sum()),
    }
