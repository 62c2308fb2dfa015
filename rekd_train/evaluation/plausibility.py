"""Do rationales agree with what people marked? By the conventions of ERASER.

Source: DeYoung et al. 2020, sec. 5, and its scorer rationale_benchmark/metrics.py. Masks are over words, one
array an example. Examples without a human rationale are left out, and their number is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rekd_train.evaluation.metrics import ratio

Span = tuple[int, int]
"""First word and the word after the last."""


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
    macro = np.mean(right / np.maximum(predictions, 1)), np.mean(right / np.maximum(truths, 1))
    micro = ratio(right.sum(), predictions.sum()), ratio(right.sum(), truths.sum())
    return {"iou_f1_macro": _f1(*macro), "iou_f1_micro": _f1(*micro)}


def area_under_precision_recall(scores: Sequence[np.ndarray], human: Sequence[np.ndarray]) -> float:
    """AUPRC: mean over examples of the area under the precision-recall curve of the words' scores.

    As the scorer computes it: scikit-learn's ``precision_recall_curve`` and ``auc`` (trapezoids). Examples in
    which every word is marked stay in.
    """
    return float(np.mean([_precision_recall_area(s, h) for s, h in zip(scores, human, strict=True)]))


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


def spans_of(mask: np.ndarray) -> list[Span]:
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


def _iou(first: Span, second: Span) -> float:
    shared = max(0, min(first[1], second[1]) - max(first[0], second[0]))
    return shared / ((first[1] - first[0]) + (second[1] - second[0]) - shared)


def _f1(precision: float, recall: float) -> float:
    return ratio(2 * precision * recall, precision + recall)


def _precision_recall_area(scores: np.ndarray, human: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_equals = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    hits = np.cumsum(human[order])[last_of_equals]
    recall, precision = hits / human.sum(), hits / (last_of_equals + 1)
    # the curve ends at recall 0 with precision 1
    recall, precision = np.append(0.0, recall), np.append(1.0, precision)
    return float(np.sum((recall[1:] - recall[:-1]) * (precision[1:] + precision[:-1]) / 2))
