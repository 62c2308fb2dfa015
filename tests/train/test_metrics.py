"""Each figure against a slow, obvious version or a case worked out by hand; scikit-learn where it is installed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rekd_train.evaluation.calibration_metrics import (
    abstain_threshold,
    area_under_risk_coverage,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    risk_coverage,
)
from rekd_train.evaluation.mask_metrics import (
    flip_rate,
    overlap,
    pairwise_jaccard,
    rank_correlation,
    selection_divergence,
    truth_summary,
)
from rekd_train.evaluation.metrics import accuracy, area_under_curve, macro_f1, never_predicted, per_class, rate_summary
from rekd_train.evaluation.significance import mean_and_std, paired_bootstrap

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
    assert macro_f1(np.array([0, 1, 1, 1, 0]), labels, 3) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_classes_as_scikit_learn_counts_them() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted = PROBABILITIES.argmax(axis=1)
    assert accuracy(PROBABILITIES, LABELS) == pytest.approx(sklearn.accuracy_score(LABELS, predicted))
    assert macro_f1(predicted, LABELS, 3) == pytest.approx(sklearn.f1_score(LABELS, predicted, average="macro"))


# rates


def test_rate_summary_by_hand() -> None:
    kept, selectable = np.array([0, 1, 2, 5]), np.array([10, 10, 4, 10])
    summary = rate_summary(kept, selectable, limits=np.array([1, 1, 1, 5]), positions=16)
    assert summary["rate"] == pytest.approx((0 + 0.1 + 0.5 + 0.5) / 4)
    assert summary["rate_padded"] == pytest.approx(8 / (4 * 16))
    assert (summary["count_mean"], summary["count_p50"], summary["count_max"]) == (2.0, 1.5, 5)
    assert summary["count_std"] == pytest.approx(np.std(kept))
    assert summary["count_p95"] == pytest.approx(np.percentile(kept, 95))
    assert (summary["empty_share"], summary["over_budget_share"]) == (0.25, 0.25)
    assert summary["rate_max"] == 0.5
    assert "over_budget_share" not in rate_summary(kept, selectable)


def test_area_is_a_mean_height() -> None:
    assert area_under_curve((0.05, 0.3, 1.0), (1.0, 1.0, 1.0)) == pytest.approx(1.0)
    assert area_under_curve((0.0, 0.5, 1.0), (0.0, 1.0, 1.0)) == pytest.approx(0.75)
    assert area_under_curve((0.5,), (0.7,)) == 0.7


# probabilities


def test_nll_and_brier_position_by_position() -> None:
    slow = [-np.log(PROBABILITIES[i, LABELS[i]]) for i in range(len(LABELS))]
    assert negative_log_likelihood(PROBABILITIES, LABELS) == pytest.approx(np.mean(slow))
    squares = [sum((PROBABILITIES[i, c] - (c == LABELS[i])) ** 2 for c in range(3)) for i in range(len(LABELS))]
    assert brier_score(PROBABILITIES, LABELS) == pytest.approx(np.mean(squares))
    assert brier_score(np.array([[0.0, 1.0]]), np.array([0])) == 2.0  # certain and wrong


def test_brier_leaves_its_argument_alone() -> None:
    before = PROBABILITIES.copy()
    brier_score(PROBABILITIES, LABELS)
    assert np.array_equal(before, PROBABILITIES)


def test_ece_bin_by_bin() -> None:
    confidence = PROBABILITIES.max(axis=1)
    total = 0.0
    for number in range(15):
        last = number == 14
        inside = [i for i, c in enumerate(confidence) if number / 15 <= c < (number + 1) / 15 or (last and c == 1)]
        if inside:
            total += abs(sum(confidence[i] for i in inside) - sum(CORRECT[i] for i in inside))
    assert expected_calibration_error(PROBABILITIES, LABELS) == pytest.approx(total / len(LABELS))


def test_equal_mass_ece_by_hand() -> None:
    probabilities = np.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]])
    labels = np.array([0, 1, 0, 0])
    # bins {.6, .7}: accuracy .5, confidence .65; {.8, .9}: 1, .85
    assert expected_calibration_error(probabilities, labels, bins=2, equal_mass=True) == pytest.approx(0.15)
    assert expected_calibration_error(probabilities, labels, bins=15, equal_mass=True) == pytest.approx(
        (0.4 + 0.7 + 0.2 + 0.1) / 4  # more bins than examples: each its own
    )


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


# masks


MASKS = generator.random((4, 30, 12)) < 0.3
MASKS[:, 0] = False  # an example that is empty in every draw


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    first, second = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    return len(first & second) / len(first | second) if first | second else 1.0


def test_overlap_set_by_set() -> None:
    a, b = MASKS[0], MASKS[1]
    measured = overlap(a, b)
    assert measured["jaccard"] == pytest.approx(np.mean([jaccard(*pair) for pair in zip(a, b, strict=True)]))
    f1 = [1.0 if not (x | y).any() else 2 * (x & y).sum() / (x.sum() + y.sum()) for x, y in zip(a, b, strict=True)]
    assert measured["f1"] == pytest.approx(np.mean(f1))


def test_pairwise_jaccard_pair_by_pair() -> None:
    pairs = [jaccard(MASKS[a, i], MASKS[b, i]) for a in range(4) for b in range(a) for i in range(30)]
    assert pairwise_jaccard(MASKS) == pytest.approx(np.mean(pairs))


def test_flip_rate_pair_by_pair() -> None:
    predicted = generator.integers(0, 3, (5, 40))
    pairs = [predicted[a, i] != predicted[b, i] for a in range(5) for b in range(a) for i in range(40)]
    assert flip_rate(predicted) == pytest.approx(np.mean(pairs))
    assert flip_rate(np.zeros((3, 8), dtype=int)) == 0.0


def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    first, second = np.round(generator.random((6, 10)), 1), np.round(generator.random((6, 10)), 1)
    selectable = generator.random((6, 10)) < 0.7
    selectable[4] = np.arange(10) < 1  # one position: no correlation
    first[5] = 0.5  # constant: no correlation
    slow = [spearmanr(first[i, selectable[i]], second[i, selectable[i]]).statistic for i in range(4)]
    assert rank_correlation(first, second, selectable) == pytest.approx(np.mean(slow))
    assert np.isnan(rank_correlation(first[5:], second[5:], selectable[5:]))


def test_selection_divergence_position_by_position() -> None:
    teacher, student = generator.normal(size=(3, 5)) * 3, generator.normal(size=(3, 5)) * 3
    selectable = generator.random((3, 5)) < 0.8
    slow = []
    for t, s in zip(teacher[selectable], student[selectable], strict=True):
        p, q = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-s))
        slow.append(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert selection_divergence(teacher, student, selectable) == pytest.approx(np.mean(slow))
    assert np.isfinite(selection_divergence(np.array([[800.0]]), np.array([[-800.0]]), np.array([[True]])))


def test_truth_by_hand() -> None:
    truth = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]], dtype=bool)
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=bool)
    assert truth_summary(mask, truth) == pytest.approx(
        {"in_truth": 2 / 4, "in_truth_mean": (1 + 1 / 3 + 0) / 3, "truth_kept": (1 / 2 + 1 / 2 + 0) / 3,
         "truth_size_used": 4 / 6}
    )  # fmt: skip


# chance


def test_bootstrap_agrees_with_drawing_items_one_by_one() -> None:
    first, second = generator.random(150) < 0.8, generator.random(150) < 0.7
    measured = paired_bootstrap(first, second, draws=4000)
    rows = generator.integers(0, 150, (4000, 150))
    slow = first[rows].mean(axis=1) - second[rows].mean(axis=1)
    assert measured["difference"] == pytest.approx(first.mean() - second.mean())
    assert measured["standard_error"] == pytest.approx(slow.std(), rel=0.1)
    assert (measured["low"], measured["high"]) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))), abs=0.02)
    assert measured["p_not_better"] == pytest.approx(np.mean(slow <= 0), abs=0.02)
    assert paired_bootstrap(first, first)["p_not_better"] == 1.0


def test_mean_and_std() -> None:
    assert mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_std([4.0]) == (4.0, 0.0)


def test_classes_that_are_never_predicted_are_named() -> None:
    names = ["a", "b", "c", "d"]
    assert never_predicted(np.array([0, 0, 3]), np.array([0, 1, 2]), names) == ["b", "c"], "d does not occur"
    assert never_predicted(np.array([1, 0]), np.array([0, 1]), names) == []
