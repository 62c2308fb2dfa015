"""Each figure against a slow, obvious version or a case worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rekd_train.evaluation import metrics

generator = np.random.default_rng(3)
PROBABILITIES, LABELS = generator.dirichlet([0.5] * 3, 200) * 0.99 + 1 / 300, generator.integers(0, 3, 200)
CONFIDENCE, CORRECT = PROBABILITIES.max(axis=1), PROBABILITIES.argmax(axis=1) == LABELS


def test_classes_by_hand() -> None:
    names, predicted, labels = ["a", "b", "c"], np.array([0, 1, 1, 1, 0]), np.array([0, 0, 1, 1, 1])
    figures = metrics.per_class(predicted, labels, names)
    assert [list(figures[name].values()) for name in names] == [
        [0.5, 0.5, 0.5, 2, 2], pytest.approx([2 / 3, 2 / 3, 2 / 3, 3, 3]), [0.0, 0.0, 0.0, 0, 0],
    ]  # fmt: skip
    assert list(figures["a"]) == ["precision", "recall", "f1", "support", "predicted"]
    assert metrics.macro_f1(predicted, labels) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics.never_predicted(np.array([0, 0, 3]), np.array([0, 1, 2]), [*names, "d"]) == ["b", "c"]
    assert metrics.never_predicted(predicted, labels, names) == []


def test_selections_by_hand() -> None:
    kept, selectable = np.array([0, 1, 2, 5]), np.array([10, 10, 4, 10])
    summary = metrics.selection_summary(kept, selectable, limits=np.array([1, 1, 1, 5]), positions=16)
    rates = [0, 0.1, 0.5, 0.5]
    assert summary == pytest.approx({
        "rate": np.mean(rates), "rate_std": np.std(rates), "rate_max": 0.5, "rate_padded": 8 / (4 * 16),
        "count_mean": 2.0, "count_std": np.std(kept), "count_p5": np.percentile(kept, 5), "count_p50": 1.5,
        "count_p95": np.percentile(kept, 95), "count_max": 5, "empty_share": 0.25, "over_budget_share": 0.25,
    })  # fmt: skip
    assert summary.keys() - metrics.selection_summary(kept, selectable) == {"over_budget_share", "rate_padded"}


@pytest.mark.parametrize(
    ("rates", "values", "area"),
    [((0.05, 0.3, 1.0), (1.0, 1.0, 1.0), 1.0), ((0.0, 0.5, 1.0), (0.0, 1.0, 1.0), 0.75), ((0.5,), (0.7,), 0.7)],
)
def test_area_is_a_mean_height(rates, values, area) -> None:
    assert metrics.area_under_curve(rates, values) == pytest.approx(area)


def test_nll_and_brier_position_by_position() -> None:
    before, found = PROBABILITIES.copy(), metrics.calibration(PROBABILITIES, LABELS)
    assert found["nll"] == pytest.approx(np.mean([-np.log(PROBABILITIES[i, LABELS[i]]) for i in range(len(LABELS))]))
    squares = [sum((PROBABILITIES[i, c] - (c == LABELS[i])) ** 2 for c in range(3)) for i in range(len(LABELS))]
    assert found["brier"] == pytest.approx(np.mean(squares))
    assert metrics.calibration(np.array([[0.0, 1.0]]), np.array([0]))["brier"] == 2.0  # certain and wrong
    assert np.array_equal(before, PROBABILITIES)


def test_ece_and_reliability_bin_by_bin() -> None:
    bins, total = [], 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(CONFIDENCE) if number / 15 <= c < (number + 1) / 15]
        if inside:
            confident, right = CONFIDENCE[inside].mean(), CORRECT[inside].mean()
            bins.append([number / 15, (number + 1) / 15, len(inside), confident, right])
            total += abs(confident - right) * len(inside)
    assert metrics.calibration(PROBABILITIES, LABELS)["ece"] == pytest.approx(total / len(LABELS))
    names = "low", "high", "examples", "confidence", "accuracy"
    found = [[each[name] for name in names] for each in metrics.reliability(PROBABILITIES, LABELS)]
    assert np.allclose(found, bins)
    assert metrics.reliability(np.array([[1.0, 0.0]]), np.array([0]))[0]["high"] == 1.0, "the last one has its edge"


def test_equal_mass_ece_by_hand() -> None:
    probabilities, labels = np.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]]), np.array([0, 1, 0, 0])
    # bins {.6, .7}: accuracy .5, confidence .65; {.8, .9}: 1, .85
    assert metrics.expected_calibration_error(probabilities, labels, 2, equal_mass=True) == pytest.approx(0.15)
    # more bins than examples: each its own
    assert metrics.calibration(probabilities, labels)["ece_equal_mass"] == pytest.approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


def test_risk_coverage_threshold_by_threshold() -> None:
    rounded = np.round(CONFIDENCE, 1)  # many ties
    thresholds, coverage, risk = metrics.risk_coverage(rounded, CORRECT)
    assert sorted(set(rounded), reverse=True) == list(thresholds)
    assert coverage == pytest.approx([(rounded >= threshold).mean() for threshold in thresholds])
    assert risk == pytest.approx([1 - CORRECT[rounded >= threshold].mean() for threshold in thresholds])


def test_aurc_is_the_mean_over_every_order_of_equals() -> None:
    confidence, correct = np.array([0.9, 0.7, 0.7, 0.7, 0.2]), np.array([True, False, True, False, True])
    orders = [(0, *middle, 4) for middle in itertools.permutations((1, 2, 3))]
    areas = [np.mean(np.cumsum(~correct[list(order)]) / np.arange(1, 6)) for order in orders]
    assert metrics.area_under_risk_coverage(confidence, correct) == pytest.approx(np.mean(areas))


@pytest.mark.parametrize(("risk", "threshold"), [(0.25, 0.6), (0.2, 0.9), (0.4, 0.5), (0.1, 0.9)])
def test_abstain_threshold_has_the_largest_coverage_within_the_risk(risk, threshold) -> None:
    confidence = np.array([0.9, 0.8, 0.8, 0.6, 0.5])
    correct = np.array([True, False, True, True, False])  # risks 0, 1/3, 1/4, 2/5
    assert metrics.abstain_threshold(confidence, correct, risk) == threshold
    assert metrics.abstain_threshold(confidence, ~correct, 0.1) is None
