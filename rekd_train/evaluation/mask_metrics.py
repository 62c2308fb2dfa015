"""Figures of masks: how alike they are, whether they hold a known truth, whether the answer depends on them.

What is called ERASER's: DeYoung et al. 2020, sec. 5, and its scorer rationale_benchmark/metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import expit, log_expit
from scipy.stats import rankdata
from sklearn.metrics import auc, precision_recall_curve

from rekd_train.evaluation.metrics import ratio

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of the features over which AOPC is a mean, as the scorer's default."""

# masks beside masks


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
        ranks = np.stack([rankdata(a[where]), rankdata(b[where])])
        if ranks.shape[1] > 1 and (np.ptp(ranks, axis=1) > 0).all():
            found.append(np.corrcoef(ranks)[0, 1])
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
    # 1 - sigmoid(d) = sigmoid(-d)
    return float(np.mean(sum(expit(a) * (log_expit(a) - log_expit(b)) for a, b in ((t, s), (-t, -s)))))


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


# do rationales agree with what people marked, by ERASER's conventions? Masks are over words, one array an example


def token_agreement(predicted: Sequence[np.ndarray], human: Sequence[np.ndarray]) -> dict[str, float]:
    """Precision, recall and F1 of words, two ways.

    ``macro``: of each example, then the mean (the scorer's "instance_macro"; its F1 is the mean of the F1s);
    ``micro``: over all words of all examples (as Bao et al. 2018 and the FR line of work report). An empty
    prediction has precision, recall and F1 0.

    Args:
        predicted: one (words,) bool for each example.
        human: one (words,) bool for each example, none of them empty of True.
    """
    both = np.array([np.sum(p & h) for p, h in zip(predicted, human, strict=True)], dtype=float)
    claimed = np.array([p.sum() for p in predicted], dtype=float)
    true = np.array([h.sum() for h in human], dtype=float)
    return {
        "precision_macro": float(np.mean(both / np.maximum(claimed, 1))),
        "recall_macro": float(np.mean(both / np.maximum(true, 1))),
        "f1_macro": float(np.mean(2 * both / np.maximum(claimed + true, 1))),
        "precision_micro": ratio(both.sum(), claimed.sum()),
        "recall_micro": ratio(both.sum(), true.sum()),
        "f1_micro": ratio(2 * both.sum(), claimed.sum() + true.sum()),
    }


def iou_f1(predicted: Sequence[np.ndarray], human: Sequence[np.ndarray], threshold: float = 0.5) -> dict[str, float]:
    """F1 of spans, a predicted span counting as right where its best overlap with a human one is enough.

    Spans are maximal runs of marked words; the overlap is |A and B| / |A or B| >= ``threshold``. ``macro`` is
    the F1 of the mean precision and the mean recall, not the mean of the F1s; ``micro`` counts over all spans.
    The scorer counts right *predicted* spans on both sides: precision over predicted, recall over human spans.
    An empty prediction has precision 0 (the scorer leaves it out of the mean, which rewards silence).
    """
    hits, claimed, true = [], [], []
    for mask, target in zip(predicted, human, strict=True):
        found, marked = spans_of(mask), spans_of(target)
        hits.append(sum(max((_iou(span, other) for other in marked), default=0.0) >= threshold for span in found))
        claimed.append(len(found))
        true.append(len(marked))
    right, predictions, truths = (np.array(counts, dtype=float) for counts in (hits, claimed, true))
    precision, recall = np.mean(right / np.maximum(predictions, 1)), np.mean(right / np.maximum(truths, 1))
    return {
        "iou_f1_macro": ratio(2 * precision * recall, precision + recall),
        "iou_f1_micro": ratio(2 * right.sum(), predictions.sum() + truths.sum()),
    }


def area_under_precision_recall(scores: Sequence[np.ndarray], human: Sequence[np.ndarray]) -> float:
    """AUPRC: mean over examples of the area under the precision-recall curve of the words' scores.

    As the scorer computes it: scikit-learn's ``precision_recall_curve`` and ``auc`` (trapezoids). Examples in
    which every word is marked stay in.
    """
    curves = [precision_recall_curve(h, s) for s, h in zip(scores, human, strict=True)]
    return float(np.mean([auc(recall, precision) for precision, recall, _ in curves]))


def plausibility(
    predicted: Sequence[np.ndarray], scores: Sequence[np.ndarray], human: Sequence[np.ndarray]
) -> dict[str, float]:
    """All of the above over the examples that have a human rationale.

    Args:
        predicted: for each example (words,) bool.
        scores: for each example (words,) float.
        human: for each example (words,) bool; without any True: not marked, left out.
    """
    marked = [row for row, mask in enumerate(human) if mask.any()]
    summary: dict[str, float] = {"examples": len(marked), "without_human_rationale": len(human) - len(marked)}
    if not marked:
        return summary
    chosen, soft, target = ([values[row] for row in marked] for values in (predicted, scores, human))
    return {
        **summary,
        **token_agreement(chosen, target),
        **iou_f1(chosen, target),
        "auprc": area_under_precision_recall(soft, target),
    }


def spans_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """Maximal runs of True, as (first, after the last)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def words_from_pieces(values: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """The largest value among each word's pieces; with bool values a word is marked if any of its pieces is.

    Args:
        values: (pieces,) bool or float.
        continues: (pieces,) bool, whether a piece belongs to the word of the piece before it.

    Returns:
        (words,).
    """
    if not len(values):
        return values
    starts = np.flatnonzero(~continues)
    return np.maximum.reduceat(values, starts if len(starts) and starts[0] == 0 else np.append(0, starts))


def _iou(first: tuple[int, int], second: tuple[int, int]) -> float:
    shared = max(0, min(first[1], second[1]) - max(first[0], second[0]))
    return shared / ((first[1] - first[0]) + (second[1] - second[0]) - shared)


# does the answer depend on the rationale, as ERASER measures it? Whose probabilities these are (the pair's own, an
# independent judge's) must be said with every figure


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
