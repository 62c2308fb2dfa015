"""Figures of masks against slow, obvious versions and cases worked out by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import spearmanr

from rekd_train.evaluation import mask_metrics

generator = np.random.default_rng(5)
MASKS = generator.random((4, 30, 12)) < 0.3
MASKS[:, 0] = False  # an example that is empty in every draw


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    first, second = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    return len(first & second) / len(first | second) if first | second else 1.0


def bits(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text], dtype=bool)


def test_overlap_set_by_set() -> None:
    measured = mask_metrics.overlap(MASKS[0], MASKS[1])
    assert measured["jaccard"] == pytest.approx(np.mean(list(map(jaccard, MASKS[0], MASKS[1]))))
    sums = (MASKS[0] & MASKS[1]).sum(axis=1), MASKS[0].sum(axis=1) + MASKS[1].sum(axis=1)
    f1 = [2 * both / sizes if sizes else 1.0 for both, sizes in zip(*sums, strict=True)]
    assert measured["f1"] == pytest.approx(np.mean(f1))


def test_draws_pair_by_pair() -> None:
    pairs = [jaccard(*pair) for a, b in combinations(MASKS, 2) for pair in zip(a, b, strict=True)]
    assert mask_metrics.pairwise_jaccard(MASKS) == pytest.approx(np.mean(pairs))
    predicted = generator.integers(0, 3, (5, 40))
    assert mask_metrics.flip_rate(predicted) == pytest.approx(np.mean([a != b for a, b in combinations(predicted, 2)]))
    assert mask_metrics.flip_rate(np.zeros((3, 8), dtype=int)) == 0.0


def test_rank_correlation_is_spearmans() -> None:
    first, second = np.round(generator.random((6, 10)), 1), np.round(generator.random((6, 10)), 1)
    selectable = generator.random((6, 10)) < 0.7
    selectable[4] = np.arange(10) < 1  # one position: no correlation
    first[5] = 0.5  # constant: no correlation
    slow = [spearmanr(first[i, selectable[i]], second[i, selectable[i]]).statistic for i in range(4)]
    assert mask_metrics.rank_correlation(first, second, selectable) == pytest.approx(np.mean(slow))
    assert np.isnan(mask_metrics.rank_correlation(first[5:], second[5:], selectable[5:]))


def test_selection_divergence_position_by_position() -> None:
    teacher, student = generator.normal(size=(3, 5)) * 3, generator.normal(size=(3, 5)) * 3
    selectable = generator.random((3, 5)) < 0.8
    p, q = (1 / (1 + np.exp(-scores[selectable])) for scores in (teacher, student))
    slow = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert mask_metrics.selection_divergence(teacher, student, selectable) == pytest.approx(slow)
    assert np.isfinite(mask_metrics.selection_divergence(np.array([[800.0]]), np.array([[-800.0]]), np.array([[True]])))


def test_truth_by_hand() -> None:
    truth, mask = (np.stack([bits(row) for row in rows.split()]) for rows in ("1100 0011 1100", "1000 1110 0000"))
    assert mask_metrics.truth_summary(mask, truth) == pytest.approx(
        {"in_truth": 2 / 4, "in_truth_mean": (1 + 1 / 3 + 0) / 3, "truth_kept": (1 / 2 + 1 / 2 + 0) / 3,
         "truth_size_used": 4 / 6}
    )  # fmt: skip


# people's marks


def agreement(predicted: list[str], human: list[str]) -> dict[str, float]:
    masks = [bits(text) for text in predicted]
    return mask_metrics.plausibility(masks, [mask.astype(float) for mask in masks], [bits(text) for text in human])


def test_tokens_by_hand() -> None:
    measured = agreement(["1100", "000000"], ["0111", "110000"])  # the second is empty: 0, 0, 0
    expected = {
        "precision_macro": (1 / 2 + 0) / 2, "recall_macro": (1 / 3 + 0) / 2, "f1_macro": (2 / 5 + 0) / 2,
        "precision_micro": 1 / 2, "recall_micro": 1 / 5, "f1_micro": 2 / 7,
    }  # fmt: skip
    assert {name: measured[name] for name in expected} == pytest.approx(expected)
    # macro is the mean of the F1s, not the F1 of the means, which would be 3/4
    assert agreement(["10", "11"], ["11", "10"])["f1_macro"] == pytest.approx(2 / 3)
    assert agreement(["1"], ["1"])["f1_macro"] == 1.0, "texts of one word"


def test_examples_without_a_human_rationale_are_counted_and_left_out() -> None:
    whole = agreement(["10", "11"], ["10", "00"])
    assert (whole["examples"], whole["without_human_rationale"], whole["f1_macro"]) == (1, 1, 1.0)
    assert agreement(["10"], ["00"]) == {"examples": 0, "without_human_rationale": 1}


def test_auprc_by_hand() -> None:
    # ranked: right, wrong, right; points (recall, precision) (0,1) (1/2,1) (1/2,1/2) (1,2/3)
    found = mask_metrics.plausibility([bits("100")], [np.array([0.9, 0.5, 0.1])], [bits("101")])["auprc"]
    assert found == pytest.approx(1 / 2 + (1 / 2) * (1 / 2 + 2 / 3) / 2)
    assert agreement(["0000"], ["1111"])["auprc"] == 1.0


@pytest.mark.parametrize(
    ("predicted", "human", "macro"),
    [
        # first: [0,2) with [0,3): 2/3, right; [5,7) with [6,8): 1/3, wrong. second: no overlap
        ("11000110 1000", "11100011 0011", 1 / 4),
        # first: P 1/2 (two spans, one right), R 1; second: P 1, R 1/2; the mean of the F1s would be 2/3
        ("1101 11000", "1100 11011", 3 / 4),
        ("1000", "1100", 1.0),  # exactly one half is right
        ("0100", "1110", 0.0),
        ("00 11", "11 11", 1 / 2),  # an empty prediction is wrong, not missing
    ],
)
def test_iou_by_hand(predicted, human, macro) -> None:
    measured = mask_metrics.iou_f1(*([bits(text) for text in texts.split()] for texts in (predicted, human)))
    assert measured["iou_f1_macro"] == pytest.approx(macro)
    if macro == 1 / 4:
        assert measured["iou_f1_micro"] == pytest.approx(2 * (1 / 3) * (1 / 3) / (2 / 3))


def test_a_word_is_marked_if_any_piece_is() -> None:
    continues = bits("00110")
    assert list(mask_metrics.words_from_pieces(bits("00011"), continues)) == [False, True, True]
    assert list(mask_metrics.words_from_pieces(np.array([-2.0, -3.0, 1.0, -1.0, 4.0]), continues)) == [-2.0, 1.0, 4.0]
    assert list(mask_metrics.words_from_pieces(bits("01"), bits("11"))) == [True]  # a text that begins within a word
    assert not len(mask_metrics.words_from_pieces(bits(""), bits("")))


# ERASER's faithfulness


def test_confidence_is_that_of_the_class_predicted_on_the_full_input() -> None:
    full = np.array([[0.9, 0.1], [0.3, 0.7]])
    assert mask_metrics.confidence_lost(full, np.array([[0.4, 0.6], [0.2, 0.8]])) == pytest.approx([0.5, -0.1])


@pytest.mark.parametrize(
    ("share", "rows"), [(0.01, ["1000", "1000"]), (0.5, ["1100", "1100"]), (1.0, ["1111", "1110"])]
)
def test_top_share_takes_at_least_one_and_the_lower_index_first(share, rows) -> None:
    scores, selectable = np.array([[5.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 9.0]]), np.stack([bits("1111"), bits("1110")])
    assert np.array_equal(mask_metrics.top_share(scores, selectable, share), [bits(row) for row in rows])
    assert not mask_metrics.top_share(scores, np.zeros((2, 4), dtype=bool), share).any()
