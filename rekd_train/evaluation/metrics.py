"""Figures of merit of labels and counts: NumPy in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose most probable class is the label: (n, C), (n,)."""
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def per_class(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each class (van Rijsbergen 1979, one class against the rest).

    A quotient without anything to divide by is 0, as in scikit-learn's ``precision_recall_fscore_support``.

    Args:
        predicted: (n,) class numbers.
        labels: (n,) class numbers.
        names: class names, in the order of the numbers.
    """
    table = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(table, (labels, predicted), 1)
    figures = {}
    for number, name in enumerate(names):
        hits, support, claimed = table[number, number], table[number].sum(), table[:, number].sum()
        figures[name] = {
            "precision": ratio(hits, claimed),
            "recall": ratio(hits, support),
            "f1": ratio(2 * hits, support + claimed),
            "support": int(support),
            "predicted": int(claimed),
        }
    return figures


def macro_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Plain mean of the classes' F1 over the classes that occur among labels or predictions.

    Definition: scikit-learn's ``f1_score(average="macro")``.
    """
    figures = per_class(predicted, labels, [str(number) for number in range(classes)]).values()
    return float(np.mean([each["f1"] for each in figures if each["support"] or each["predicted"]]))


def never_predicted(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """The classes that occur among the labels and never among the predictions; arguments as ``per_class``."""
    return [names[number] for number in np.setdiff1d(labels, predicted)]


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
    """Area under ``values`` over ascending ``rates`` by the trapezoid rule, over the range of the rates.

    So it is a mean height: 1 if every value is 1, whatever rates were measured.
    """
    x, y = np.asarray(rates, dtype=float), np.asarray(values, dtype=float)
    if len(x) < 2:
        return float(y.mean())
    return float(np.sum((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2) / (x[-1] - x[0]))


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is no whole."""
    return float(part / whole) if whole else 0.0
