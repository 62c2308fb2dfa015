"""Is a difference more than chance? Paired bootstrap within a seed, mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
    """Mean of (n,) values over items, with a percentile interval from drawing items with replacement.

    Returns:
        ``mean``, ``low`` and ``high`` of its 95 % interval.
    """
    array = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    means = [array[generator.integers(0, len(array), len(array))].mean() for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is 0 for one value."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0
