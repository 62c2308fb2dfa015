"""Figures of labels, probabilities and counts, and of differences between models: NumPy in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.integrate import trapezoid
from sklearn.metrics import f1_score, precision_recall_fscore_support

# labels


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose most probable class is the label: (n, C), (n,)."""
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def per_class(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each class; a quotient without anything to divide by is 0.

    Args:
        predicted: (n,) class numbers.
        labels: (n,) class numbers.
        names: class names, in the order of the numbers.
    """
    figures = precision_recall_fscore_support(labels, predicted, labels=range(len(names)), zero_division=0.0)
    claimed = np.bincount(predicted, minlength=len(names))
    return {
        name: {
            "precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support),
            "predicted": int(count),
        }
        for name, precision, recall, f1, support, count in zip(names, *figures, claimed, strict=True)
    }  # fmt: skip


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


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over examples of the squared distance to the one-hot label, summed over classes (Brier 1950): 0 to 2."""
    distance = probabilities.astype(np.float64)
    distance[np.arange(len(labels)), labels] -= 1
    return float(np.mean(np.sum(distance**2, axis=1)))


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, equal_mass: bool = False
) -> float:
    """ECE: mean over bins of |accuracy - confidence|, weighted by the bins' share (Guo et al. 2017, eq. 3).

    Args:
        probabilities: (n, C); the confidence is the largest of a row.
        labels: (n,).
        bins: how many.
        equal_mass: bins with equally many examples in the order of confidence (Nixon et al. 2019) instead of
            equally wide ones.
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    if equal_mass:
        groups = [group for group in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(group)]
    else:
        groups = list(_equally_wide(confidence, bins).values())
    gaps = [abs(confidence[group].mean() - correct[group].mean()) * len(group) for group in groups]
    return float(sum(gaps) / len(labels))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[dict[str, float]]:
    """The equally wide bins behind the ECE, for a diagram, in ascending order, empty ones left out: (n, C), (n,).

    Returns:
        Of each bin ``low`` and ``high``, its edges, ``examples``, mean ``confidence`` and ``accuracy``.
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    return [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "examples": len(group),
            "confidence": float(confidence[group].mean()),
            "accuracy": float(correct[group].mean()),
        }
        for number, group in _equally_wide(confidence, bins).items()
    ]


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The curve of a classifier that abstains below a threshold of confidence (El-Yaniv and Wiener 2010).

    Args:
        confidence: (n,).
        correct: (n,) bool.

    Returns:
        Descending thresholds (t,), one for each distinct confidence; of the examples with at least that
        confidence their share, ``coverage`` (t,), and their share of errors, ``risk`` (t,).
    """
    order = np.argsort(-confidence, kind="stable")
    ordered, errors = confidence[order], np.cumsum(~correct[order])
    last_of_equals = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    accepted = last_of_equals + 1
    return ordered[last_of_equals], accepted / len(ordered), errors[last_of_equals] / accepted


def area_under_risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> float:
    """AURC: mean over k = 1..n of the error of the k most confident (Geifman et al. 2019, sec. 2).

    Examples of equal confidence count as in a mean over their orders.
    """
    _, coverage, risk = risk_coverage(confidence, correct)
    accepted = np.rint(coverage * len(confidence)).astype(int)
    steps = np.arange(1, len(confidence) + 1)
    expected = np.interp(steps, np.append(0, accepted), np.append(0.0, risk * accepted))
    return float(np.mean(expected / steps))


def abstain_threshold(confidence: np.ndarray, correct: np.ndarray, risk: float) -> float | None:
    """The confidence from which on to answer so that at most ``risk`` of the answers are wrong.

    The threshold of the largest coverage whose empirical risk is within the limit (Geifman and El-Yaniv
    2017, without their confidence bound: what holds on dev holds elsewhere only about as well).

    Returns:
        Answer where confidence >= threshold; None: no threshold reaches the risk.
    """
    thresholds, _, risks = risk_coverage(confidence, correct)
    within = np.flatnonzero(risks <= risk)
    return float(thresholds[within[-1]]) if len(within) else None


def _equally_wide(confidence: np.ndarray, bins: int) -> dict[int, np.ndarray]:
    """The examples of each bin that has any, by the bin's number."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return {number: np.flatnonzero(index == number) for number in np.unique(index).tolist()}


# counts


def rate_summary(
    kept: np.ndarray,
    selectable: np.ndarray,
    limits: np.ndarray | None = None,
    positions: int | None = None,
) -> dict[str, float]:
    """How much the rationales hold.

    Args:
        kept: (n,) kept features.
        selectable: (n,) real features.
        limits: (n,) most features that the budget allows; None: not counted.
        positions: N, all positions of an input, padding and specials included; None: not counted.

    Returns:
        ``rate`` (mean over examples of kept / real) with ``rate_std`` and ``rate_max``; the counts' mean, std,
        percentiles and maximum; ``empty_share``; with ``limits`` ``over_budget_share``; with ``positions``
        ``rate_padded`` (mean kept / N, as the paper counts).
    """
    rates = kept / np.maximum(selectable, 1)
    low, middle, high = np.percentile(kept, (5, 50, 95))
    summary = {
        "rate": float(rates.mean()),
        "rate_std": float(rates.std()),
        "rate_max": float(rates.max()),
        "count_mean": float(kept.mean()),
        "count_std": float(kept.std()),
        "count_p5": float(low),
        "count_p50": float(middle),
        "count_p95": float(high),
        "count_max": int(kept.max()),
        "empty_share": float(np.mean(kept == 0)),
    }
    if limits is not None:
        summary["over_budget_share"] = float(np.mean(kept > limits))
    if positions is not None:
        summary["rate_padded"] = float(kept.mean() / positions)
    return summary


def area_under_curve(rates: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of ``values`` over the range of the ascending ``rates``, by the trapezoid rule.

    So it is 1 if every value is 1, whatever rates were measured.
    """
    if len(rates) < 2:
        return float(np.mean(values))
    return float(trapezoid(values, rates) / (rates[-1] - rates[0]))


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is no whole."""
    return float(part / whole) if whole else 0.0


# is a difference more than chance?


def paired_bootstrap(first: np.ndarray, second: np.ndarray, draws: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Difference of two models' accuracy on the same test items, with a percentile interval.

    Items are drawn with replacement, the same ones for both models (Efron and Tibshirani 1993; Berg-Kirkpatrick
    et al. 2012 for systems on one test set).

    Args:
        first: (n,) bool, whether the first model was right.
        second: (n,) bool, of the second.

    Returns:
        ``difference`` = accuracy of the first - of the second, ``low`` and ``high`` of its 95 % interval,
        ``standard_error``, and ``p_not_better``: share of draws in which the first is not better.
    """
    gains = first.astype(np.int64) - second.astype(np.int64)
    # only +1, 0 and -1 occur, so a draw of n items is a multinomial of their numbers
    counts = np.array([(gains > 0).sum(), (gains < 0).sum(), (gains == 0).sum()])
    drawn = np.random.default_rng(seed).multinomial(len(gains), counts / len(gains), size=draws)
    differences = (drawn[:, 0] - drawn[:, 1]) / len(gains)
    low, high = np.percentile(differences, (2.5, 97.5))
    return {
        "difference": float(gains.mean()),
        "low": float(low),
        "high": float(high),
        "standard_error": float(differences.std()),
        "p_not_better": float(np.mean(differences <= 0)),
    }


def bootstrap_mean(values: np.ndarray, draws: int = 2_000, seed: int = 0) -> dict[str, float]:
    """``mean`` of (n,) values and ``low`` and ``high`` of its 95 % interval, from drawing items with replacement."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is 0 for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
