"""Each figure of labels, probabilities and masks against a slow, obvious version or a case worked out by hand."""

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


def bins_by_mass(bins: int) -> float:
    probabilities = np.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]])
    return metrics.expected_calibration_error(probabilities, np.array([0, 1, 0, 0]), bins, equal_mass=True)


def threshold(risk: float, right: str = "10110") -> float | None:
    """Risks 0, 1/3, 1/4, 2/5 at the confidences."""
    return metrics.abstain_threshold(np.array([0.9, 0.8, 0.8, 0.6, 0.5]), bits(right), risk)


def agreement(predicted: str, human: str, scores=None) -> dict[str, float]:
    masks, marks = ([bits(text) for text in texts.split()] for texts in (predicted, human))
    return mask_metrics.plausibility(masks, scores or [mask.astype(float) for mask in masks], marks)


def words(values, continues: str) -> list:
    return list(mask_metrics.words_from_pieces(np.array(values), bits(continues)))


def top(share: float, selectable: str = "1111 1110") -> np.ndarray:
    scores = np.array([[5.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 9.0]])
    return mask_metrics.top_share(scores, rows(selectable), share)


def rows(text: str) -> np.ndarray:
    return np.stack([bits(row) for row in text.split()])


NAMES, PREDICTED, TRUE = ["a", "b", "c"], np.array([0, 1, 1, 1, 0]), np.array([0, 0, 1, 1, 1])
COLUMNS = "precision", "recall", "f1", "support", "predicted"
KEPT, REAL = np.array([0, 1, 2, 5]), np.array([10, 10, 4, 10])
SUMMARY = {"rate": 1.1 / 4, "rate_std": np.std([0, 0.1, 0.5, 0.5]), "rate_max": 0.5, "count_mean": 2.0, "count_max": 5,
           "count_std": np.std(KEPT), "count_p5": np.percentile(KEPT, 5), "count_p50": 1.5,
           "count_p95": np.percentile(KEPT, 95), "empty_share": 0.25}  # fmt: skip
SURE, CHANGED = np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([[0.4, 0.6], [0.2, 0.8]])


@pytest.mark.parametrize(("figure", "expected"), [
    *((lambda name=name: metrics.per_class(PREDICTED, TRUE, NAMES)[name], dict(zip(COLUMNS, row, strict=True)))
      for name, row in (("a", (1 / 2, 1 / 2, 1 / 2, 2, 2)), ("b", (2 / 3, 2 / 3, 2 / 3, 3, 3)), ("c", (0,) * 5))),
    (lambda: metrics.macro_f1(PREDICTED, TRUE), (1 / 2 + 2 / 3) / 2),
    (lambda: metrics.selection_summary(KEPT, REAL), SUMMARY),
    (lambda: metrics.selection_summary(KEPT, REAL, np.array([1, 1, 1, 5]), 16),
     SUMMARY | {"over_budget_share": 0.25, "rate_padded": 8 / (4 * 16)}),
    (lambda: metrics.area_under_curve((0.05, 0.3, 1.0), (1.0, 1.0, 1.0)), 1.0),  # a mean height
    (lambda: metrics.area_under_curve((0.0, 0.5, 1.0), (0.0, 1.0, 1.0)), 0.75),
    (lambda: metrics.area_under_curve((0.5,), (0.7,)), 0.7),
    (lambda: bins_by_mass(2), 0.15),  # bins {.6, .7}: accuracy .5, confidence .65; {.8, .9}: 1, .85
    (lambda: bins_by_mass(15), (0.4 + 0.7 + 0.2 + 0.1) / 4),  # more bins than examples: each its own
    # the largest coverage within the risk
    (lambda: [threshold(risk) for risk in (0.25, 0.2, 0.4, 0.1)], [0.6, 0.9, 0.5, 0.9]),
    (lambda: mask_metrics.truth_summary(rows("1000 1110 0000"), rows("1100 0011 1100")), {
        "in_truth": 2 / 4, "in_truth_mean": (1 + 1 / 3 + 0) / 3, "truth_kept": (1 / 2 + 1 / 2 + 0) / 3,
        "truth_size_used": 4 / 6}),
    # people's marks; the second is empty: 0, 0, 0
    (lambda: agreement("1100 000000", "0111 110000"), {
        "precision_macro": (1 / 2 + 0) / 2, "recall_macro": (1 / 3 + 0) / 2, "f1_macro": (2 / 5 + 0) / 2,
        "precision_micro": 1 / 2, "recall_micro": 1 / 5, "f1_micro": 2 / 7}),
    (lambda: agreement("10 11", "11 10"), {"f1_macro": 2 / 3}),  # not the F1 of the means, which would be 3/4
    (lambda: agreement("1", "1"), {"f1_macro": 1.0}), (lambda: agreement("0000", "1111"), {"auprc": 1.0}),
    (lambda: agreement("10 11", "10 00"), {"examples": 1, "without_human_rationale": 1, "f1_macro": 1.0}),
    (lambda: agreement("10", "00"), {"examples": 0, "without_human_rationale": 1}),
    # ranked: right, wrong, right; points (recall, precision) (0,1) (1/2,1) (1/2,1/2) (1,2/3)
    (lambda: agreement("100", "101", [np.array([0.9, 0.5, 0.1])]), {"auprc": 1 / 2 + (1 / 2) * (1 / 2 + 2 / 3) / 2}),
    # spans. first: [0,2) with [0,3): 2/3, right; [5,7) with [6,8): 1/3, wrong. second: no overlap
    (lambda: agreement("11000110 1000", "11100011 0011"), {"iou_f1_macro": 1 / 4, "iou_f1_micro": 1 / 3}),
    # first: P 1/2 (two spans, one right), R 1; second: P 1, R 1/2; the mean of the F1s would be 2/3
    (lambda: agreement("1101 11000", "1100 11011"), {"iou_f1_macro": 3 / 4}),
    (lambda: agreement("1000", "1100"), {"iou_f1_macro": 1.0}),  # exactly one half is right
    (lambda: agreement("0100", "1110"), {"iou_f1_macro": 0.0}),
    (lambda: agreement("00 11", "11 11"), {"iou_f1_macro": 1 / 2}),  # an empty prediction is wrong, not missing
    # a word is marked if any piece is; a text may begin within a word
    (lambda: words(bits("00011"), "00110"), [False, True, True]), (lambda: words(bits("01"), "11"), [True]),
    (lambda: words([-2.0, -3.0, 1.0, -1.0, 4.0], "00110"), [-2.0, 1.0, 4.0]), (lambda: words(bits(""), ""), []),
    # ERASER's faithfulness: of the class predicted on the full input; at least one, the lower index first
    (lambda: list(mask_metrics.confidence_lost(SURE, CHANGED)), [0.5, -0.1]),
    (lambda: top(0.01), rows("1000 1000")), (lambda: top(0.5), rows("1100 1100")),
    (lambda: top(1.0), rows("1111 1110")), (lambda: top(0.5, "0000 0000"), rows("0000 0000"))])  # fmt: skip
def test_figures_by_hand(figure, expected) -> None:
    found = figure()
    if isinstance(expected, dict):
        assert {name: found[name] for name in expected} == approx(expected)
        assert len(found) == len(expected) or found["examples"], "nothing else but of people's marks"
    else:
        assert found == approx(expected)


def test_calibration_risk_and_coverage_bin_by_bin_and_by_threshold() -> None:
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
        "ece": sum(abs(confident - right) * count for _, _, count, confident, right in bins) / 200})  # fmt: skip
    names = "low", "high", "examples", "confidence", "accuracy"
    reliability = metrics.reliability(PROBABILITIES, LABELS)
    assert np.allclose([[each[name] for name in names] for each in reliability], bins)
    assert metrics.reliability(np.array([[1.0, 0.0]]), np.array([0]))[0]["high"] == 1.0, "the last one has its edge"
    assert metrics.calibration(np.array([[0.0, 1.0]]), np.array([0]))["brier"] == 2.0, "certain and wrong"
    assert np.array_equal(before, PROBABILITIES)
    assert metrics.never_predicted(np.array([0, 0, 3]), np.array([0, 1, 2]), [*NAMES, "d"]) == ["b", "c"]
    assert metrics.never_predicted(PREDICTED, TRUE, NAMES) == [] and threshold(0.1, "01001") is None
    rounded = np.round(CONFIDENCE, 1)  # many ties
    thresholds, coverage, risk = metrics.risk_coverage(rounded, CORRECT)
    accepted = [rounded >= threshold for threshold in thresholds]
    assert sorted(set(rounded), reverse=True) == list(thresholds)
    assert coverage == approx([each.mean() for each in accepted])
    assert risk == approx([1 - CORRECT[each].mean() for each in accepted])
    confidence, correct = np.array([0.9, 0.7, 0.7, 0.7, 0.2]), np.array([True, False, True, False, True])
    orders = [[0, *middle, 4] for middle in permutations((1, 2, 3))]
    areas = [np.mean(np.cumsum(~correct[order]) / np.arange(1, 6)) for order in orders]
    assert metrics.area_under_risk_coverage(confidence, correct) == approx(np.mean(areas))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0


def test_overlap_rank_correlation_and_divergence_position_by_position() -> None:
    both, sizes = (MASKS[0] & MASKS[1]).sum(axis=1), (MASKS[0].sum(axis=1) + MASKS[1].sum(axis=1))
    expected = {"jaccard": np.mean(list(map(jaccard, MASKS[0], MASKS[1]))),
                "f1": np.mean([*(2 * both[1:] / sizes[1:]), 1.0])}  # fmt: skip
    assert mask_metrics.overlap(MASKS[0], MASKS[1]) == approx(expected)
    pairs = [jaccard(*pair) for a, b in combinations(MASKS, 2) for pair in zip(a, b, strict=True)]
    assert mask_metrics.pairwise_jaccard(MASKS) == approx(np.mean(pairs))
    predicted = generator.integers(0, 3, (5, 40))
    assert mask_metrics.flip_rate(predicted) == approx(np.mean([a != b for a, b in combinations(predicted, 2)]))
    assert mask_metrics.flip_rate(np.zeros((3, 8), dtype=int)) == 0.0
    first, second = np.round(generator.random((2, 6, 10)), 1)
    selectable = generator.random((6, 10)) < 0.7
    selectable[4] = np.arange(10) < 1  # one position: no correlation
    first[5] = 0.5  # constant: no correlation
    slow = [spearmanr(first[i, selectable[i]], second[i, selectable[i]]).statistic for i in range(4)]
    assert mask_metrics.rank_correlation(first, second, selectable) == approx(np.mean(slow))
    assert np.isnan(mask_metrics.rank_correlation(first[5:], second[5:], selectable[5:]))
    (teacher, student), selectable = generator.normal(size=(2, 3, 5)) * 3, generator.random((3, 5)) < 0.8
    p, q = (1 / (1 + np.exp(-scores[selectable])) for scores in (teacher, student))
    slow = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert mask_metrics.selection_divergence(teacher, student, selectable) == approx(slow)
    assert np.isfinite(mask_metrics.selection_divergence(np.array([[800.0]]), np.array([[-800.0]]), np.array([[True]])))
