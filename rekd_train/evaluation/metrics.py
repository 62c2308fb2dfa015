"""Figures of labels, probabilities and counts: NumPy in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import auc, f1_score, precision_recall_fscore_support

# labels


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose most probable class is the label: (n, C), (n,)."""
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def per_class(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1, support and predictions of each class (0 without any), from (n,) class numbers."""
    figures = precision_recall_fscore_support(labels, predicted, labels=range(len(names)), zero_division=0.0)
    keys = ("precision", "recall", "f1", "support", "predicted")
    columns = np.array([*figures, np.bincount(predicted, minlength=len(names))]).T
    return {name: {key: int(value) if key in keys[3:] else float(value) for key, value in zip(keys, row, strict=True)}
            for name, row in zip(names, columns, strict=True)}


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Plain mean of the classes' F1 over the classes that occur among labels or predictions: (n,), (n,)."""
    return float(f1_score(labels, predicted, average="macro", zero_division=0.0))


def never_predicted(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """The classes that occur among the labels and never among the predictions; arguments as ``per_class``."""
    return [names[number] for number in np.setdiff1d(labels, predicted)]


# probabilities


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean -log p(label) in nats: (n, C), (n,)."""
    return float(-np.mean(np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1))))


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``nll``, ``brier``, ``ece`` and ``ece_equal_mass`` of (n, C) probabilities and (n,) labels.

    Brier: mean over examples of the squared distance to the one-hot label, summed over classes (Brier 1950): 0 to 2.
    """
    distance = probabilities.astype(np.float64)
    distance[np.arange(len(labels)), labels] -= 1
    return {
        "nll": negative_log_likelihood(probabilities, labels), "brier": float(np.mean(np.sum(distance**2, axis=1))),
        "ece": expected_calibration_error(probabilities, labels),
        "ece_equal_mass": expected_calibration_error(probabilities, labels, equal_mass=True),
    }


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15,
                               equal_mass: bool = False) -> float:
    """ECE: mean over bins, by their share, of |accuracy - confidence| (Guo et al. 2017, eq. 3): (n, C), (n,).

    Bins are equally wide, or with ``equal_mass`` hold equally many examples (Nixon et al. 2019).
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    if equal_mass:
        groups = [group for group in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(group)]
    else:
        groups = list(_equally_wide(confidence, bins).values())
    gaps = [abs(confidence[group].mean() - correct[group].mean()) * len(group) for group in groups]
    return float(sum(gaps) / len(labels))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[dict[str, float]]:
    """The equally wide bins behind the ECE in ascending order, empty ones left out: (n, C), (n,)."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    return [{"low": number / bins, "high": (number + 1) / bins, "examples": len(group),
             "confidence": float(confidence[group].mean()), "accuracy": float(correct[group].mean())}
            for number, group in _equally_wide(confidence, bins).items()]


def _equally_wide(confidence: np.ndarray, bins: int) -> dict[int, np.ndarray]:
    """The examples of each bin that has any, by the bin's number."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return {number: np.flatnonzero(index == number) for number in np.unique(index).tolist()}


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The curve of a classifier that abstains below a threshold of (n,) confidence (El-Yaniv and Wiener 2010).

    Returns descending thresholds (t,), one for each distinct confidence; of the examples with at least that confidence
    their share, ``coverage`` (t,), and their share of errors, ``risk`` (t,).
    """
    order = np.argsort(-confidence, kind="stable")
    ordered, errors = confidence[order], np.cumsum(~correct[order])
    last_of_equals = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    accepted = last_of_equals + 1
    return ordered[last_of_equals], accepted / len(ordered), errors[last_of_equals] / accepted


def area_under_risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> float:
    """AURC: mean over k = 1..n of the error of the k most confident, equals averaged (Geifman et al. 2019, sec. 2)."""
    _, coverage, risk = risk_coverage(confidence, correct)
    accepted = np.rint(coverage * len(confidence)).astype(int)
    steps = np.arange(1, len(confidence) + 1)
    expected = np.interp(steps, np.append(0, accepted), np.append(0.0, risk * accepted))
    return float(np.mean(expected / steps))


def abstain_threshold(confidence: np.ndarray, correct: np.ndarray, risk: float) -> float | None:
    """The confidence from which on at most ``risk`` of the predictions are wrong; None: no threshold reaches it.

    That of the largest coverage (Geifman and El-Yaniv 2017, without their bound: dev's holds elsewhere about as well).
    """
    thresholds, _, risks = risk_coverage(confidence, correct)
    within = np.flatnonzero(risks <= risk)
    return float(thresholds[within[-1]]) if len(within) else None


# counts


def selection_summary(kept: np.ndarray, selectable: np.ndarray, limits: np.ndarray | None = None,
                      positions: int | None = None) -> dict[str, float]:
    """How much the rationales hold, from (n,) counts of kept and of real features.

    ``rate`` (the selection rate: mean over examples of kept / real) with ``rate_std`` and ``rate_max``; the counts'
    mean, std, percentiles and maximum; ``empty_share``; with the most that the budget allows, ``limits`` (n,),
    ``over_budget_share``; with ``positions``, N with padding and all, ``rate_padded`` (mean kept / N, the paper's).
    """
    rates = kept / np.maximum(selectable, 1)
    low, middle, high = np.percentile(kept, (5, 50, 95))
    summary = {
        "rate": rates.mean(), "rate_std": rates.std(), "rate_max": rates.max(),
        "count_mean": kept.mean(), "count_std": kept.std(), "count_p5": low, "count_p50": middle, "count_p95": high,
        "empty_share": np.mean(kept == 0),
    }  # fmt: skip
    if limits is not None:
        summary["over_budget_share"] = np.mean(kept > limits)
    if positions is not None:
        summary["rate_padded"] = kept.mean() / positions
    return {name: float(value) for name, value in summary.items()} | {"count_max": int(kept.max())}


def area_under_curve(rates: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of ``values`` over the range of the ascending ``rates``, by trapezoids: 1 if every value is 1."""
    return float(auc(rates, values) / (rates[-1] - rates[0])) if len(rates) > 1 else float(np.mean(values))


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is no whole."""
    return float(part / whole) if whole else 0.0


def bootstrap_mean(values: np.ndarray, draws: int = 2_000, seed: int = 0) -> dict[str, float]:
    """``mean`` of (n,) values and ``low`` and ``high`` of its 95 % interval, from drawing items with replacement."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
