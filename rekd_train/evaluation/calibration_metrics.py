"""Do the probabilities mean what they say? Proper scores, calibration errors, the risk-coverage curve."""

from __future__ import annotations

import numpy as np


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
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    if equal_mass:
        groups = [group for group in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(group)]
    else:
        index = np.minimum((confidence * bins).astype(int), bins - 1)
        groups = [np.flatnonzero(index == number) for number in np.unique(index)]
    gaps = [abs(confidence[group].mean() - correct[group].mean()) * len(group) for group in groups]
    return float(sum(gaps) / len(labels))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> list[dict[str, float]]:
    """The bins behind the ECE, for a diagram: equally wide, in ascending order, empty ones left out.

    Args:
        probabilities: (n, C); the confidence is the largest of a row.
        labels: (n,).

    Returns:
        Of each bin ``low`` and ``high``, its edges, ``examples``, mean ``confidence`` and ``accuracy``.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "examples": int(np.sum(index == number)),
            "confidence": float(confidence[index == number].mean()),
            "accuracy": float(correct[index == number].mean()),
        }
        for number in np.unique(index).tolist()
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
    errors = risk * accepted
    steps = np.arange(1, len(confidence) + 1)
    expected = np.interp(steps, np.append(0, accepted), np.append(0.0, errors))
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
