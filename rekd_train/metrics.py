"""Figures of merit: NumPy in, numbers out (definitions in docs/method.md)."""

from __future__ import annotations

import numpy as np


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose most probable class is the label: (n, C), (n,)."""
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean -log p(label) in nats."""
    return float(-np.mean(np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1))))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """ECE over equal-width bins of the predicted class's probability."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[index == b].mean() - correct[index == b].mean()) * np.mean(index == b)
        for b in range(bins)
        if np.any(index == b)
    ]
    return float(sum(gaps))


def rate_summary(kept: np.ndarray, selectable: np.ndarray) -> dict[str, float]:
    """How much the rationales hold.

    Args:
        kept: (n,) kept features.
        selectable: (n,) real features.

    Returns:
        ``rate`` (mean over examples of kept / real), ``rate_std``, ``rate_max``, ``count_mean``,
        ``empty_share``.
    """
    rates = kept / np.maximum(selectable, 1)
    return {
        "rate": float(rates.mean()),
        "rate_std": float(rates.std()),
        "rate_max": float(rates.max()),
        "count_mean": float(kept.mean()),
        "empty_share": float(np.mean(kept == 0)),
    }
