"""Figures of masks in NumPy: how alike they are, whether they hold a known reason, which tokens they keep.

What is called ERASER's: DeYoung et al. 2020, sec. 5, and its scorer rationale_benchmark/metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.ndimage import find_objects, label
from scipy.special import expit, log_expit
from scipy.stats import rankdata
from sklearn.metrics import auc, f1_score, jaccard_score, precision_recall_curve, precision_recall_fscore_support

from rekd_train.data import Split
from rekd_train.evaluation.metrics import ratio
from rekd_train.inputs.preprocessors import Preprocessor, vocabulary_of
from rekd_train.inputs.text import TextPreprocessor

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)  # shares of the features over which AOPC is a mean, as the scorer's default

# masks beside masks


def overlap(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Mean over examples of the Jaccard index and F1 of two masks (n, N) bool; two empty masks are the same mask: 1."""
    scores = {"jaccard": jaccard_score, "f1": f1_score}
    return {name: float(of(first, second, average="samples", zero_division=1.0)) for name, of in scores.items()}


def pairwise_jaccard(masks: np.ndarray) -> float:
    """Mean over pairs of draws of ``overlap``'s Jaccard index: (R, n, N) bool of R >= 2 draws."""
    return float(np.mean([overlap(*pair)["jaccard"] for pair in combinations(masks, 2)]))


def flip_rate(predicted: np.ndarray) -> float:
    """Chance that two draws of an example's rationale give different classes: (R, n) class numbers of R >= 2 draws."""
    draws = len(predicted)
    same = sum(np.sum(counts * (counts - 1)) for counts in ((predicted == c).sum(axis=0) for c in np.unique(predicted)))
    return float(1 - same / (draws * (draws - 1) * predicted.shape[1]))


def rank_correlation(first: np.ndarray, second: np.ndarray, selectable: np.ndarray) -> float:
    """Mean over examples of Spearman's rho of two scores (n, N) over selectable positions; nan if none has a rho."""
    found = []
    for a, b, where in zip(first, second, selectable, strict=True):
        ranks = np.stack([rankdata(a[where]), rankdata(b[where])])
        if ranks.shape[1] > 1 and (np.ptp(ranks, axis=1) > 0).all():
            found.append(np.corrcoef(ranks)[0, 1])
    return float(np.mean(found)) if found else float("nan")


def selection_divergence(teacher: np.ndarray, student: np.ndarray, selectable: np.ndarray) -> float:
    """Mean over selectable positions of KL(Bernoulli(sigmoid(d_T)) || Bernoulli(sigmoid(d_S))), nats: (n, N) scores d.

    The rationale term of distillation (REKD sec. 3.3) without noise at temperature 1, for each position.
    """
    t, s = teacher[selectable].astype(np.float64), student[selectable].astype(np.float64)
    # 1 - sigmoid(d) = sigmoid(-d)
    return float(np.mean(sum(expit(a) * (log_expit(a) - log_expit(b)) for a, b in ((t, s), (-t, -s)))))


# against the known reason of each label: the true tile of an image, people's marks on a text by ERASER's conventions


def reason_figures(preprocessor: Preprocessor, split: Split, scores: np.ndarray, selectable: np.ndarray,
                   mask: np.ndarray) -> dict[str, Any]:
    """``truth`` (of patches) or ``human_rationales`` (of whole words within what the model reads) of (n, N) arrays.

    A word is selected or marked if any of its pieces is. Nothing where the data know no reasons.
    """
    if split.truth is None:
        return {}
    known = [row for row, truth in enumerate(split.truth) if truth is not None]
    if not isinstance(preprocessor, TextPreprocessor):
        found = truth_summary(mask[known], _padded([split.truth[row] for row in known], mask.shape[1]))
        return {"truth": {"examples": len(known), **found}}
    continues = vocabulary_of(preprocessor).continues
    predicted, soft, human = [], [], []
    for row in known:
        where = np.flatnonzero(selectable[row, : len(split.truth[row])])
        joined = continues[np.asarray(split.ids[row])[where]]
        predicted.append(words_from_pieces(mask[row, where], joined))
        soft.append(words_from_pieces(scores[row, where], joined))
        human.append(words_from_pieces(split.truth[row][where], joined))
    return {"human_rationales": plausibility(predicted, soft, human)}


def truth_summary(mask: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How much of a rationale lies in a known truth, and how much of the truth it holds: (n, N) bool, both.

    ``in_truth``: share of all kept features that lie in the truth; ``in_truth_mean``: mean of the examples' shares (an
    empty rationale: 0); ``truth_kept``: mean share of the truth that is kept; ``truth_size_used``: kept / true.
    """
    both, kept, true = (mask & truth).sum(axis=1), mask.sum(axis=1), truth.sum(axis=1)
    return {
        "in_truth": ratio(both.sum(), kept.sum()), "in_truth_mean": float(np.mean(both / np.maximum(kept, 1))),
        "truth_kept": float(np.mean(both / np.maximum(true, 1))), "truth_size_used": ratio(kept.sum(), true.sum()),
    }


def plausibility(predicted: Sequence[np.ndarray], scores: Sequence[np.ndarray],
                 human: Sequence[np.ndarray]) -> dict[str, float]:
    """Agreement with people's marks over the examples that have any.

    Each example has (words,); without any mark it is left out. Tokens (precision, recall, F1): ``macro`` is the mean
    over examples (the scorer's "instance_macro"), ``micro`` is over all words (as Bao et al. 2018 and the FR line of
    work); an empty prediction has 0. Spans: ``iou_f1``. ``auprc``: mean over examples of the area under the
    precision-recall curve of the words' scores, by trapezoids.
    """
    marked = [row for row, mask in enumerate(human) if mask.any()]
    summary: dict[str, float] = {"examples": len(marked), "without_human_rationale": len(human) - len(marked)}
    if not marked:
        return summary
    chosen, soft, target = ([values[row] for row in marked] for values in (predicted, scores, human))
    width = max(2, *map(len, target))
    for kind, average in (("macro", "samples"), ("micro", "micro")):
        found = precision_recall_fscore_support(_padded(target, width), _padded(chosen, width), average=average,
                                                zero_division=0.0)
        summary |= {f"{name}_{kind}": float(found[i]) for i, name in enumerate(("precision", "recall", "f1"))}
    curves = [precision_recall_curve(h, s) for s, h in zip(soft, target, strict=True)]
    areas = [auc(recall, precision) for precision, recall, _ in curves]
    return {**summary, **iou_f1(chosen, target), "auprc": float(np.mean(areas))}


def iou_f1(predicted: Sequence[np.ndarray], human: Sequence[np.ndarray], threshold: float = 0.5) -> dict[str, float]:
    """F1 of spans, a predicted span counting as right where its best overlap with a human one is enough.

    Spans are maximal runs of marked words; the overlap is |A and B| / |A or B| >= ``threshold``. ``macro`` is
    the F1 of the mean precision and the mean recall, not the mean of the F1s; ``micro`` counts over all spans.
    The scorer counts right *predicted* spans on both sides: precision over predicted, recall over human spans.
    An empty prediction has precision 0 (the scorer leaves it out of the mean, which rewards silence).
    """
    counts = []
    for mask, target in zip(predicted, human, strict=True):
        found, marked = spans_of(mask), spans_of(target)
        right = sum(max((_iou(span, other) for other in marked), default=0.0) >= threshold for span in found)
        counts.append((right, len(found), len(marked)))
    hits, claimed, true = np.array(counts, dtype=float).T
    precision, recall = np.mean(hits / np.maximum(claimed, 1)), np.mean(hits / np.maximum(true, 1))
    macro = ratio(2 * precision * recall, precision + recall)
    return {"iou_f1_macro": macro, "iou_f1_micro": ratio(2 * hits.sum(), claimed.sum() + true.sum())}


def spans_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """Maximal runs of True, as (first, after the last)."""
    return [(run.start, run.stop) for (run,) in find_objects(label(mask)[0])]


def words_from_pieces(values: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """The largest value among each word's pieces, (words,) from (pieces,); a piece may continue the one before it."""
    starts = np.flatnonzero(~continues | (np.arange(len(continues)) == 0))
    return np.maximum.reduceat(values, starts) if len(values) else values


def _iou(first: tuple[int, int], second: tuple[int, int]) -> float:
    shared = max(0, min(first[1], second[1]) - max(first[0], second[0]))
    return shared / ((first[1] - first[0]) + (second[1] - second[0]) - shared)


def _padded(rows: Sequence[np.ndarray], width: int, fill: int = 0) -> np.ndarray:
    """(n, width) of rows that may be shorter."""
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=fill) for row in rows])


def token_figures(preprocessor: Preprocessor, split: Split, mask: np.ndarray) -> dict[str, Any]:
    """What kind of tokens an (n, N) bool mask selects, as ``tokens``; nothing for images.

    ``punctuation_selected`` is to be read beside ``punctuation``, its share of all tokens of the texts.
    """
    if not isinstance(preprocessor, TextPreprocessor):
        return {}
    vocabulary = vocabulary_of(preprocessor)
    ids = _padded(split.ids, mask.shape[1], preprocessor.special_ids["pad"])
    kept, texts = ids[mask], ids[~vocabulary.special[ids]]
    figures = {"special_selected": ratio(vocabulary.special[kept].sum(), len(kept))}
    for name, kind in (("punctuation", vocabulary.punctuation), ("word_pieces", vocabulary.continues)):
        figures[f"{name}_selected"] = ratio(kind[kept].sum(), len(kept))
        figures[name] = ratio(kind[texts].sum(), len(texts))
    return {"tokens": figures}


# does the prediction depend on the rationale, as ERASER measures it? Whose probabilities these are (the pair's own, an
# independent judge's) must be said with every figure


def confidence_lost(full: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """p_j(x) - p_j(reduced x), j the class predicted on the full input: (n,) from (n, C) twice.

    ERASER's comprehensiveness where the rationale was removed (higher is better), its sufficiency where nothing else
    is left (lower is better). AOPC is the mean of either over rationale sizes; a size that gives the same mask as the
    one before counts again, as in the scorer.
    """
    rows, predicted = np.arange(len(full)), full.argmax(axis=1)
    return full[rows, predicted] - reduced[rows, predicted]


def top_share(scores: np.ndarray, selectable: np.ndarray, share: float) -> np.ndarray:
    """(n, N) bool: the ceil(share * n) best-scored selectable features of each example, at least 1, lower first."""
    mask = np.zeros(scores.shape, dtype=bool)
    ranked = np.argsort(np.where(selectable, -scores, np.inf), axis=1, kind="stable")
    for row, count in enumerate(selectable.sum(axis=1)):
        mask[row, ranked[row, : min(int(count), max(1, math.ceil(share * count - 1e-9)))]] = True
    return mask
