"""Each figure of labels, probabilities and masks against a slow, obvious version or a case worked out by hand."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from pytest import approx
from scipy.stats import spearmanr

from rekd_train.evaluation import mask_metrics, metrics

generator = np.random.default_rng(3)
PROBABILITIES, LABELS = generator.dirichlet([0.5] * 3, 200) * 0.99 + 1 / 300, generator.integers(0, 3, 200)
CONFIDENCE, CORRECT = PROBABILITIES.max(axis=1), PROBABILITIES.argmax(axis=1) == LABELS
MASKS = generator.random((4, 30, 12)) < 0.3
MASKS[:, 0] = False  # an example that is empty in every draw


def bits(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text], dtype=bool)


# labels, counts and probabilities


def test_classes_by_hand() -> None:
    names, predicted, labels = ["a", "b", "c"], np.array([0, 1, 1, 1, 0]), np.array([0, 0, 1, 1, 1])
    columns = ("precision", "recall", "f1", "support", "predicted")
    rows = [0.5, 0.5, 0.5, 2, 2], [2 / 3, 2 / 3, 2 / 3, 3, 3], [0.0, 0.0, 0.0, 0, 0]
    expected = {name: approx(dict(zip(columns, row, strict=True))) for name, row in zip(names, rows, strict=True)}
    assert metrics.per_class(predicted, labels, names) == expected
    assert metrics.macro_f1(predicted, labels) == approx((1 / 2 + 2 / 3) / 2)
    assert metrics.never_predicted(np.array([0, 0, 3]), np.array([0, 1, 2]), [*names, "d"]) == ["b", "c"]
    assert metrics.never_predicted(predicted, labels, names) == []


def test_selections_by_hand() -> None:
    kept, selectable = np.array([0, 1, 2, 5]), np.array([10, 10, 4, 10])
    summary = metrics.selection_summary(kept, selectable, limits=np.array([1, 1, 1, 5]), positions=16)
    rates = [0, 0.1, 0.5, 0.5]
    assert summary == approx({
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
    assert metrics.area_under_curve(rates, values) == approx(area)


def test_calibration_position_by_position_and_bin_by_bin() -> None:
    before, found = PROBABILITIES.copy(), metrics.calibration(PROBABILITIES, LABELS)
    squares = [sum((PROBABILITIES[i, c] - (c == LABELS[i])) ** 2 for c in range(3)) for i in range(200)]
    bins = []
    for number in range(15):
        inside = (number / 15 <= CONFIDENCE) & ((number + 1) / 15 > CONFIDENCE)
        if inside.any():
            figures = inside.sum(), CONFIDENCE[inside].mean(), CORRECT[inside].mean()
            bins.append([number / 15, (number + 1) / 15, *figures])
    assert found.pop("ece_equal_mass") >= 0
    assert found == approx({
        "nll": -np.log(PROBABILITIES[np.arange(200), LABELS]).mean(), "brier": np.mean(squares),
        "ece": sum(abs(confident - right) * count for _, _, count, confident, right in bins) / 200,
    })  # fmt: skip
    names = "low", "high", "examples", "confidence", "accuracy"
    reliability = metrics.reliability(PROBABILITIES, LABELS)
    assert np.allclose([[each[name] for name in names] for each in reliability], bins)
    assert metrics.reliability(np.array([[1.0, 0.0]]), np.array([0]))[0]["high"] == 1.0, "the last one has its edge"
    assert metrics.calibration(np.array([[0.0, 1.0]]), np.array([0]))["brier"] == 2.0, "certain and wrong"
    assert np.array_equal(before, PROBABILITIES)


def test_equal_mass_ece_by_hand() -> None:
    probabilities, labels = np.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]]), np.array([0, 1, 0, 0])
    # bins {.6, .7}: accuracy .5, confidence .65; {.8, .9}: 1, .85
    assert metrics.expected_calibration_error(probabilities, labels, 2, equal_mass=True) == approx(0.15)
    # more bins than examples: each its own
    assert metrics.calibration(probabilities, labels)["ece_equal_mass"] == approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


def test_risk_coverage_threshold_by_threshold() -> None:
    rounded = np.round(CONFIDENCE, 1)  # many ties
    thresholds, coverage, risk = metrics.risk_coverage(rounded, CORRECT)
    accepted = [rounded >= threshold for threshold in thresholds]
    assert sorted(set(rounded), reverse=True) == list(thresholds)
    assert coverage == approx([each.mean() for each in accepted])
    assert risk == approx([1 - CORRECT[each].mean() for each in accepted])


def test_aurc_is_the_mean_over_every_order_of_equals() -> None:
    confidence, correct = np.array([0.9, 0.7, 0.7, 0.7, 0.2]), np.array([True, False, True, False, True])
    orders = [[0, *middle, 4] for middle in permutations((1, 2, 3))]
    areas = [np.mean(np.cumsum(~correct[order]) / np.arange(1, 6)) for order in orders]
    assert metrics.area_under_risk_coverage(confidence, correct) == approx(np.mean(areas))


@pytest.mark.parametrize(("risk", "threshold"), [(0.25, 0.6), (0.2, 0.9), (0.4, 0.5), (0.1, 0.9)])
def test_abstain_threshold_has_the_largest_coverage_within_the_risk(risk, threshold) -> None:
    confidence = np.array([0.9, 0.8, 0.8, 0.6, 0.5])
    correct = np.array([True, False, True, True, False])  # risks 0, 1/3, 1/4, 2/5
    assert metrics.abstain_threshold(confidence, correct, risk) == threshold
    assert metrics.abstain_threshold(confidence, ~correct, 0.1) is None


# masks beside masks


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0


def test_overlap_and_draws_pair_by_pair() -> None:
    both, sizes = (MASKS[0] & MASKS[1]).sum(axis=1), (MASKS[0].sum(axis=1) + MASKS[1].sum(axis=1))
    expected = {
        "jaccard": np.mean(list(map(jaccard, MASKS[0], MASKS[1]))), "f1": np.mean([*(2 * both[1:] / sizes[1:]), 1.0]),
    }  # fmt: skip
    assert mask_metrics.overlap(MASKS[0], MASKS[1]) == approx(expected)
    pairs = [jaccard(*pair) for a, b in combinations(MASKS, 2) for pair in zip(a, b, strict=True)]
    assert mask_metrics.pairwise_jaccard(MASKS) == approx(np.mean(pairs))
    predicted = generator.integers(0, 3, (5, 40))
    assert mask_metrics.flip_rate(predicted) == approx(np.mean([a != b for a, b in combinations(predicted, 2)]))
    assert mask_metrics.flip_rate(np.zeros((3, 8), dtype=int)) == 0.0


def test_rank_correlation_is_spearmans() -> None:
    first, second = np.round(generator.random((2, 6, 10)), 1)
    selectable = generator.random((6, 10)) < 0.7
    selectable[4] = np.arange(10) < 1  # one position: no correlation
    first[5] = 0.5  # constant: no correlation
    slow = [spearmanr(first[i, selectable[i]], second[i, selectable[i]]).statistic for i in range(4)]
    assert mask_metrics.rank_correlation(first, second, selectable) == approx(np.mean(slow))
    assert np.isnan(mask_metrics.rank_correlation(first[5:], second[5:], selectable[5:]))


def test_selection_divergence_position_by_position() -> None:
    (teacher, student), selectable = generator.normal(size=(2, 3, 5)) * 3, generator.random((3, 5)) < 0.8
    p, q = (1 / (1 + np.exp(-scores[selectable])) for scores in (teacher, student))
    slow = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert mask_metrics.selection_divergence(teacher, student, selectable) == approx(slow)
    assert np.isfinite(mask_metrics.selection_divergence(np.array([[800.0]]), np.array([[-800.0]]), np.array([[True]])))


# against a known reason


def test_truth_by_hand() -> None:
    truth, mask = (np.stack([bits(row) for row in rows.split()]) for rows in ("1100 0011 1100", "1000 1110 0000"))
    assert mask_metrics.truth_summary(mask, truth) == approx(
        {"in_truth": 2 / 4, "in_truth_mean": (1 + 1 / 3 + 0) / 3, "truth_kept": (1 / 2 + 1 / 2 + 0) / 3,
         "truth_size_used": 4 / 6}
    )  # fmt: skip


def agreement(predicted: str, human: str) -> dict[str, float]:
    masks, marks = ([bits(text) for text in texts.split()] for texts in (predicted, human))
    return mask_metrics.plausibility(masks, [mask.astype(float) for mask in masks], marks)


@pytest.mark.parametrize(("predicted", "human", "expected"), [
    # the second is empty: 0, 0, 0
    ("1100 000000", "0111 110000", {
        "precision_macro": (1 / 2 + 0) / 2, "recall_macro": (1 / 3 + 0) / 2, "f1_macro": (2 / 5 + 0) / 2,
        "precision_micro": 1 / 2, "recall_micro": 1 / 5, "f1_micro": 2 / 7}),
    ("10 11", "11 10", {"f1_macro": 2 / 3}),  # the mean of the F1s, not the F1 of the means, which would be 3/4
    ("1", "1", {"f1_macro": 1.0}), ("0000", "1111", {"auprc": 1.0}),
    ("10 11", "10 00", {"examples": 1, "without_human_rationale": 1, "f1_macro": 1.0}),
    ("10", "00", {"examples": 0, "without_human_rationale": 1}),
    # spans. first: [0,2) with [0,3): 2/3, right; [5,7) with [6,8): 1/3, wrong. second: no overlap
    ("11000110 1000", "11100011 0011", {"iou_f1_macro": 1 / 4, "iou_f1_micro": 1 / 3}),
    # first: P 1/2 (two spans, one right), R 1; second: P 1, R 1/2; the mean of the F1s would be 2/3
    ("1101 11000", "1100 11011", {"iou_f1_macro": 3 / 4}),
    ("1000", "1100", {"iou_f1_macro": 1.0}),  # exactly one half is right
    ("0100", "1110", {"iou_f1_macro": 0.0}),
    ("00 11", "11 11", {"iou_f1_macro": 1 / 2}),  # an empty prediction is wrong, not missing
])  # fmt: skip
def test_agreement_with_people_by_hand(predicted, human, expected) -> None:
    measured = agreement(predicted, human)
    assert {name: measured[name] for name in expected} == approx(expected)
    assert (len(measured) == 2) == (measured["examples"] == 0)


def test_auprc_by_hand_is_that_of_the_scores() -> None:
    # ranked: right, wrong, right; points (recall, precision) (0,1) (1/2,1) (1/2,1/2) (1,2/3)
    found = mask_metrics.plausibility([bits("100")], [np.array([0.9, 0.5, 0.1])], [bits("101")])["auprc"]
    assert found == approx(1 / 2 + (1 / 2) * (1 / 2 + 2 / 3) / 2)


def test_a_word_is_marked_if_any_piece_is() -> None:
    continues, scores = bits("00110"), np.array([-2.0, -3.0, 1.0, -1.0, 4.0])
    assert list(mask_metrics.words_from_pieces(bits("00011"), continues)) == [False, True, True]
    assert list(mask_metrics.words_from_pieces(scores, continues)) == [-2.0, 1.0, 4.0]
    assert list(mask_metrics.words_from_pieces(bits("01"), bits("11"))) == [True]  # a text that begins within a word
    assert not len(mask_metrics.words_from_pieces(bits(""), bits("")))


# ERASER's faithfulness


def test_confidence_is_that_of_the_class_predicted_on_the_full_input() -> None:
    full = np.array([[0.9, 0.1], [0.3, 0.7]])
    assert mask_metrics.confidence_lost(full, np.array([[0.4, 0.6], [0.2, 0.8]])) == approx([0.5, -0.1])


@pytest.mark.parametrize(("share", "rows"), [(0.01, "1000 1000"), (0.5, "1100 1100"), (1.0, "1111 1110")])
def test_top_share_takes_at_least_one_and_the_lower_index_first(share, rows) -> None:
    scores, selectable = np.array([[5.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 9.0]]), np.stack([bits("1111"), bits("1110")])
    assert np.array_equal(mask_metrics.top_share(scores, selectable, share), [bits(row) for row in rows.split()])
    assert not mask_metrics.top_share(scores, np.zeros((2, 4), dtype=bool), share).any()
