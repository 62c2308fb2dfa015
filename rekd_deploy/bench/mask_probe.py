"""How much of the label is in the pattern alone: classifiers that see where features were kept and not which.

Answers are out of fold (stratified, 5 folds where the classes allow it), so every example is judged by a classifier
that has not seen it. Logistic regression and gradient-boosted trees, from scikit-learn; the better one counts, on both
sides of every comparison.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from rekd_deploy.bench.features import Features
from rekd_train.errors import MissingExtraError

FOLDS = 5
_TENTHS = 10


class Probe(NamedTuple):
    """What can be said of the labels from the pattern, and without it."""

    figures: dict[str, Any]
    pattern: np.ndarray
    """(n,) bool: right from the pattern."""
    baseline: np.ndarray
    """(n,) bool: right from the number of features alone, or by always naming the commonest class."""


def mask_probe(mask: np.ndarray, features: Features, labels: np.ndarray, seed: int = 0) -> Probe | None:
    """Predict labels from the pattern.

    Args:
        mask: (n, N) bool, the rationales.

    Returns:
        None where a class has fewer than 2 examples, or there is one class alone.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    present, counts = np.unique(labels, return_counts=True)
    folds = min(FOLDS, int(counts.min()))
    if len(present) < 2 or folds < 2:
        return None
    majority = labels == present[counts.argmax()]
    sizes = features.counts[:, None].astype(float)
    constant = len(np.unique(sizes)) == 1
    by_length = {} if constant else _out_of_fold(sizes, labels, folds, seed)
    by_pattern = _out_of_fold(pattern_columns(mask, features), labels, folds, seed)
    baseline = max([majority, *by_length.values()], key=np.mean)
    pattern = max(by_pattern.values(), key=np.mean)
    figures = {
        "majority": float(majority.mean()),
        "length_only": None if constant else float(max(map(np.mean, by_length.values()))),
        "mask_only": float(pattern.mean()),
        **{name: float(right.mean()) for name, right in by_pattern.items()},
        "folds": folds,
    }
    return Probe(figures, pattern, baseline)


def pattern_columns(mask: np.ndarray, features: Features) -> np.ndarray:
    """(n, columns) float: every position's bit, counts, and where the kept ones lie relative to the length."""
    selectable = features.selectable
    chosen = mask & selectable
    counts, kept = features.counts.astype(float), chosen.sum(axis=1).astype(float)
    # 0 for the first selectable feature, 1 for the last
    places = (selectable.cumsum(axis=1) - 1) / np.maximum(counts[:, None] - 1, 1)
    mean = _ratio((places * chosen).sum(axis=1), kept)
    spread = np.sqrt(np.maximum(_ratio((places**2 * chosen).sum(axis=1), kept) - mean**2, 0))
    first = np.where(kept > 0, np.where(chosen, places, np.inf).min(axis=1, initial=2), 0)
    last = np.where(kept > 0, np.where(chosen, places, -np.inf).max(axis=1, initial=-1), 0)
    neighbours = (chosen[:, 1:] & chosen[:, :-1]).sum(axis=1)
    tenth = np.minimum((places * _TENTHS).astype(int), _TENTHS - 1)
    histogram = [_ratio((chosen & (tenth == number)).sum(axis=1), kept) for number in range(_TENTHS)]
    summary = [counts, kept, _ratio(kept, counts), mean, spread, first, last, _ratio(neighbours, kept), *histogram]
    used = chosen[:, chosen.any(axis=0)]
    return np.column_stack([*summary, used]).astype(float)


def _out_of_fold(columns: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> dict[str, np.ndarray]:
    """By classifier (n,) bool: which labels are predicted by one that was fitted to the other folds."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise MissingExtraError("scikit-learn", "bench") from None
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    classifiers = {
        "logistic_regression": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500)),
        "boosted_trees": HistGradientBoostingClassifier(max_iter=30, max_leaf_nodes=8, random_state=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return {
            name: cross_val_predict(classifier, columns, labels, cv=split) == labels
            for name, classifier in classifiers.items()
        }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)
