"""Leakage probes (definition 4.4): does the pattern of a rationale tell the label, whatever its content?

A selector and a predictor that are trained together can agree on a code: early words for one class, late ones for the
other. The prediction is then right and its rationale means nothing. Each probe takes the content away and looks at what
is left, by classifiers that see where features were kept and not which: logistic regression and gradient-boosted trees,
from scikit-learn, the better one on both sides of every comparison, out of fold (stratified, 5 where classes allow).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rekd_deploy.bench.examples import Features
from rekd_deploy.bench.judges import Judged, in_points, paired, random_masks
from rekd_deploy.bench.results import Check, not_applicable, verdict
from rekd_deploy.bench.subject import Exam, fitted

MASK_ONLY = "the pattern alone does not tell the label"
NEUTRAL = "neutral content in the true pattern does not tell the label"
OTHERS = "another example's pattern does not bring its label along"
CODE = "the rationale convinces a judge that shares no code with it"
TOKENS = "special tokens and punctuation are not preferred"
LEAK_LIMIT = 0.05
"""Accuracy that a pattern may add to what is known without it: 5 points."""
SPECIAL_LIMIT = 0.01
PUNCTUATION_LIMIT = 2.0
"""Times its share of the text."""
FOLDS = 5
_TENTHS = 10
_FEW = "too few examples of a class, or one class alone"


def leakage(exam: Exam) -> tuple[dict[str, Any], list[Check]]:
    """Probes (a), (b) and (c) on the served predictor."""
    features, mask, labels = exam.features, exam.chosen.mask, exam.labels
    figures: dict[str, Any] = {}
    probe = mask_probe(mask, features, labels, exam.seed)
    if probe is None:
        checks = [not_applicable(name, _FEW) for name in (MASK_ONLY, NEUTRAL)]
    else:
        pattern = probe.pattern
        gain = paired(pattern.astype(float) - probe.baseline)
        figures["mask_only"] = {**probe.figures, "gain": gain}
        right = exam.classes_of(features.neutral(), mask) == labels
        blank = paired(right.astype(float) - probe.baseline)
        figures["neutral_content"] = {"accuracy": float(right.mean()), "gain": blank}
        checks = [
            _leak_check(MASK_ONLY, gain, f"{pattern.mean():.1%} right from the pattern, above length and majority"),
            _leak_check(NEUTRAL, blank, f"{right.mean():.1%} right without content, above length and majority"),
        ]
    generator = np.random.default_rng(exam.seed)
    checks.append(_others(exam, generator, figures))
    random = exam.classes_of(features, random_masks(mask, features.selectable, generator))
    found = {"accuracy": random, "accuracy_on_rationales": exam.classes}
    figures["random_masks"] = {name: float(np.mean(classes == labels)) for name, classes in found.items()}
    return figures, checks


def _leak_check(name: str, gain: Mapping[str, float], said: str) -> Check:
    """A pattern must not add more than ``LEAK_LIMIT`` to a baseline; ``said`` is what the gain is, for the sentence."""
    words = f"{said}: {in_points(gain)} (limit {100 * LEAK_LIMIT:g} points)"
    if gain["mean"] > LEAK_LIMIT and gain["low"] <= 0:
        return not_applicable(name, f"{words}; too few examples to tell it from none", limit=LEAK_LIMIT)
    return verdict(name, gain["mean"] <= LEAK_LIMIT, words, gain["mean"], LEAK_LIMIT)


def covert_code(found: Judged | None, logits: np.ndarray, labels: np.ndarray, why_not: str = "") -> Check:
    """Probe (d): right from its rationale where the independent judge finds no more in it than in random features.

    ``found`` is the independent judge's, None: there is none, and ``why_not``; logits (n, C) are the served ones.
    """
    if found is None:
        return not_applicable(CODE, why_not, limit=0.0)
    own = logits.argmax(axis=1) == labels
    random, theirs, full = (found.correct[name] for name in ("random", "rationale", "full"))
    ours, judge, ceiling = (paired(right.astype(float) - random) for right in (own, theirs, full))
    words = (
        f"served {own.mean():.1%}; the independent judge {theirs.mean():.1%} from the rationale, {random.mean():.1%} "
        f"from as many random features, {full.mean():.1%} from everything (limit: above random with 95 % confidence)"
    )
    passed, why = judge["low"] > 0, ""
    if not passed and ours["low"] <= 0:
        why = "the served predictions are no better than that, so there is nothing to hide"
    elif not passed and ceiling["low"] <= 0:
        why = "the judge is too weak to tell"
    if why:
        return not_applicable(CODE, f"{words}; {why}", limit=0.0)
    return verdict(CODE, passed, words, judge["mean"], 0.0)


def token_check(tokens: dict[str, float] | None) -> Check:
    """Probe (e); ``tokens`` as ``rekd_train.evaluation.mask_metrics.token_figures`` has them, None for images."""
    if tokens is None:
        return not_applicable(TOKENS, "images have neither")
    special, marks, usual = (tokens[name] for name in ("special_selected", "punctuation_selected", "punctuation"))
    limit = PUNCTUATION_LIMIT * usual
    words = (
        f"{special:.1%} of what is selected are special tokens (limit {SPECIAL_LIMIT:.0%}), {marks:.1%} punctuation, "
        f"which is {usual:.1%} of the texts (limit {PUNCTUATION_LIMIT:g} times that)"
    )
    return verdict(TOKENS, special <= SPECIAL_LIMIT and marks <= limit, words, marks, limit)


def _others(exam: Exam, generator: np.random.Generator, figures: dict[str, Any]) -> Check:
    """Predictions on the pattern of an example of another class, beside the pattern of one of the same class."""
    labels, features = exam.labels, exam.features
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.min() < 2:
        return not_applicable(OTHERS, _FEW)
    others, same = (_nearest(features.counts, labels, generator, other) for other in (True, False))
    found = {}
    for name, donors in (("other_class", others), ("same_class", same)):
        mask = fitted(exam.subject, features, exam.chosen.mask[donors] & features.selectable)
        found[name] = exam.classes_of(features, mask)
    follows, by_chance = (found[name] == labels[others] for name in ("other_class", "same_class"))
    gain = paired(follows.astype(float) - by_chance)
    figures["other_masks"] = {
        **{f"accuracy_{name}": float(np.mean(classes == labels)) for name, classes in found.items()},
        "follows_other_class": float(follows.mean()), "follows_by_chance": float(by_chance.mean()), "gain": gain,
    }  # fmt: skip
    said = f"{follows.mean():.1%} answer the class that the pattern came from, above a pattern of the own class"
    return _leak_check(OTHERS, gain, said)


def _nearest(counts: np.ndarray, labels: np.ndarray, generator: np.random.Generator, other: bool) -> np.ndarray:
    """(n,) for each example one nearest in length, of another class or another one of its own; ties at random."""
    found = []
    for row, label in enumerate(labels):
        distance = np.where((labels != label) == other, np.abs(counts - counts[row]).astype(float), np.inf)
        distance[row] = np.inf
        found.append(generator.choice(np.flatnonzero(distance == distance.min())))
    return np.array(found)


# classifiers that see the pattern alone


class Probe(NamedTuple):
    """What can be said of the labels from the pattern, and without it."""

    figures: dict[str, Any]
    pattern: np.ndarray
    """(n,) bool: right from the pattern."""
    baseline: np.ndarray
    """(n,) bool: right from the number of features alone, or by always naming the commonest class."""


def mask_probe(mask: np.ndarray, features: Features, labels: np.ndarray, seed: int = 0) -> Probe | None:
    """Predict labels from the pattern of rationales (n, N) bool.

    Returns:
        None where a class has fewer than 2 examples, or there is one class alone.
    """
    present, counts = np.unique(labels, return_counts=True)
    folds = min(FOLDS, int(counts.min()))
    if len(present) < 2 or folds < 2:
        return None
    majority = labels == present[counts.argmax()]
    sizes = features.counts[:, None].astype(float)
    constant = len(np.unique(sizes)) == 1
    by_length = {} if constant else _out_of_fold(sizes, labels, folds, seed)
    by_pattern = _out_of_fold(_pattern_columns(mask, features), labels, folds, seed)
    pattern = max(by_pattern.values(), key=np.mean)
    figures = {
        "majority": float(majority.mean()),
        "length_only": None if constant else float(max(map(np.mean, by_length.values()))),
        "mask_only": float(pattern.mean()), **{name: float(right.mean()) for name, right in by_pattern.items()},
        "folds": folds,
    }
    return Probe(figures, pattern, max([majority, *by_length.values()], key=np.mean))


def _pattern_columns(mask: np.ndarray, features: Features) -> np.ndarray:
    """(n, columns) float: every position's bit, counts, and where the kept ones lie relative to the length."""
    selectable = features.selectable
    chosen = mask & selectable
    counts, kept = features.counts.astype(float), chosen.sum(axis=1).astype(float)
    some = np.maximum(kept, 1)
    # 0 for the first selectable feature, 1 for the last
    places = (selectable.cumsum(axis=1) - 1) / np.maximum(counts[:, None] - 1, 1)
    mean = (places * chosen).sum(axis=1) / some
    spread = np.sqrt(np.maximum((places**2 * chosen).sum(axis=1) / some - mean**2, 0))
    first = np.where(kept > 0, np.where(chosen, places, np.inf).min(axis=1, initial=2), 0)
    last = np.where(kept > 0, np.where(chosen, places, -np.inf).max(axis=1, initial=-1), 0)
    neighbours = (chosen[:, 1:] & chosen[:, :-1]).sum(axis=1)
    tenth = np.minimum((places * _TENTHS).astype(int), _TENTHS - 1)
    histogram = [(chosen & (tenth == number)).sum(axis=1) / some for number in range(_TENTHS)]
    summary = [counts, kept, kept / np.maximum(counts, 1), mean, spread, first, last, neighbours / some, *histogram]
    return np.column_stack([*summary, chosen[:, chosen.any(axis=0)]]).astype(float)


def _out_of_fold(columns: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> dict[str, np.ndarray]:
    """By classifier (n,) bool: which labels are predicted by one that was fitted to the other folds."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

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
