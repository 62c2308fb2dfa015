"""Each figure against a slow, obvious version or a case worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rekd_train.evaluation.metrics import (
    abstain_threshold,
    area_under_curve,
    area_under_risk_coverage,
    calibration,
    expected_calibration_error,
    macro_f1,
    never_predicted,
    per_class,
    reliability,
    risk_coverage,
    selection_summary,
)

generator = np.random.default_rng(3)


def random_probabilities(n: int, classes: int) -> np.ndarray:
    values = generator.random((n, classes)) ** 3 + 1e-3
    return values / values.sum(axis=1, keepdims=True)


PROBABILITIES, LABELS = random_probabilities(200, 3), generator.integers(0, 3, 200)
CONFIDENCE = np.round(PROBABILITIES.max(axis=1), 1)  # rounded: many ties
CORRECT = PROBABILITIES.argmax(axis=1) == LABELS


# classes


def test_per_class_by_hand() -> None:
    #                 a  a  b  b  b  (c never)
    labels = np.array([0, 0, 1, 1, 1])
    figures = per_class(np.array([0, 1, 1, 1, 0]), labels, ["a", "b", "c"])
    assert figures["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2, "predicted": 2}
    assert figures["b"] == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3, "predicted": 3}
    )
    assert figures["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0, "predicted": 0}
    assert macro_f1(np.array([0, 1, 1, 1, 0]), labels) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_classes_that_are_never_predicted_are_named() -> None:
    names = ["a", "b", "c", "d"]
    assert never_predicted(np.array([0, 0, 3]), np.array([0, 1, 2]), names) == ["b", "c"], "d does not occur"
    assert never_predicted(np.array([1, 0]), np.array([0, 1]), names) == []


# counts


def test_selection_summary_by_hand() -> None:
    kept, selectable = np.array([0, 1, 2, 5]), np.array([10, 10, 4, 10])
    summary = selection_summary(kept, selectable, limits=np.array([1, 1, 1, 5]), positions=16)
    assert summary["rate"] == pytest.approx((0 + 0.1 + 0.5 + 0.5) / 4)
    assert summary["rate_padded"] == pytest.approx(8 / (4 * 16))
    assert (summary["count_mean"], summary["count_p50"], summary["count_max"]) == (2.0, 1.5, 5)
    assert summary["count_std"] == pytest.approx(np.std(kept))
    assert summary["count_p95"] == pytest.approx(np.percentile(kept, 95))
    assert (summary["empty_share"], summary["over_budget_share"]) == (0.25, 0.25)
    assert summary["rate_max"] == 0.5
    assert "over_budget_share" not in selection_summary(kept, selectable)


def test_area_is_a_mean_height() -> None:
    assert area_under_curve((0.05, 0.3, 1.0), (1.0, 1.0, 1.0)) == pytest.approx(1.0)
    assert area_under_curve((0.0, 0.5, 1.0), (0.0, 1.0, 1.0)) == pytest.approx(0.75)
    assert area_under_curve((0.5,), (0.7,)) == 0.7


# probabilities


def test_nll_and_brier_position_by_position() -> None:
    before, found = PROBABILITIES.copy(), calibration(PROBABILITIES, LABELS)
    assert found["nll"] == pytest.approx(np.mean([-np.log(PROBABILITIES[i, LABELS[i]]) for i in range(len(LABELS))]))
    squares = [sum((PROBABILITIES[i, c] - (c == LABELS[i])) ** 2 for c in range(3)) for i in range(len(LABELS))]
    assert found["brier"] == pytest.approx(np.mean(squares))
    assert calibration(np.array([[0.0, 1.0]]), np.array([0]))["brier"] == 2.0  # certain and wrong
    assert np.array_equal(before, PROBABILITIES)


def test_ece_and_reliability_bin_by_bin() -> None:
    confidence = PROBABILITIES.max(axis=1)
    bins, total = [], 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(confidence) if number / 15 <= c < (number + 1) / 15]
        if inside:
            bins.append((number / 15, len(inside), confidence[inside].mean(), CORRECT[inside].mean()))
            total += abs(sum(confidence[inside]) - sum(CORRECT[inside]))
    assert calibration(PROBABILITIES, LABELS)["ece"] == pytest.approx(total / len(LABELS))
    found = reliability(PROBABILITIES, LABELS)
    assert [[each[name] for name in ("low", "examples", "confidence", "accuracy")] for each in found] == [
        pytest.approx(each) for each in bins
    ]
    assert reliability(np.array([[1.0, 0.0]]), np.array([0]))[0]["high"] == 1.0, "the last bin has its upper edge"


def test_equal_mass_ece_by_hand() -> None:
    probabilities, labels = np.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]]), np.array([0, 1, 0, 0])
    # bins {.6, .7}: accuracy .5, confidence .65; {.8, .9}: 1, .85
    assert expected_calibration_error(probabilities, labels, bins=2, equal_mass=True) == pytest.approx(0.15)
    # more bins than examples: each its own
    assert calibration(probabilities, labels)["ece_equal_mass"] == pytest.approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


def test_risk_coverage_threshold_by_threshold() -> None:
    thresholds, coverage, risk = risk_coverage(CONFIDENCE, CORRECT)
    assert sorted(set(CONFIDENCE), reverse=True) == list(thresholds)
    for threshold, covered, wrong in zip(thresholds, coverage, risk, strict=True):
        accepted = np.array([c >= threshold for c in CONFIDENCE])
        assert covered == pytest.approx(accepted.mean())
        assert wrong == pytest.approx(1 - CORRECT[accepted].mean())


def test_aurc_is_the_mean_over_every_order_of_equals() -> None:
    confidence, correct = np.array([0.9, 0.7, 0.7, 0.7, 0.2]), np.array([True, False, True, False, True])
    areas = []
    for order in itertools.permutations(range(5)):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            errors = np.cumsum(~correct[list(order)])
            areas.append(np.mean(errors / np.arange(1, 6)))
    assert len(areas) == 6
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(np.mean(areas))


def test_abstain_threshold_has_the_largest_coverage_within_the_risk() -> None:
    confidence = np.array([0.9, 0.8, 0.8, 0.6, 0.5])
    correct = np.array([True, False, True, True, False])  # risks 0, 1/3, 1/4, 2/5
    assert abstain_threshold(confidence, correct, 0.25) == 0.6
    assert abstain_threshold(confidence, correct, 0.2) == 0.9
    assert abstain_threshold(confidence, correct, 0.4) == 0.5
    assert abstain_threshold(confidence, ~correct, 0.1) is None
