"""Figures of masks against slow, obvious versions; human rationales by the ERASER conventions, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rekd_train.evaluation.mask_metrics import (
    area_over_perturbation_curve,
    area_under_precision_recall,
    comprehensiveness,
    flip_rate,
    iou_f1,
    overlap,
    pairwise_jaccard,
    plausibility,
    rank_correlation,
    selection_divergence,
    spans_of,
    sufficiency,
    token_agreement,
    top_share,
    truth_summary,
    words_from_pieces,
)

generator = np.random.default_rng(5)


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


# people's marks


def bits(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


def test_spans_are_maximal_runs() -> None:
    assert spans_of(bits("1101110")) == [(0, 2), (3, 6)]
    assert spans_of(bits("0001")) == [(3, 4)]
    assert spans_of(bits("000")) == []


def test_tokens_by_hand() -> None:
    predicted = [bits("1100"), bits("000000")]  # the second is empty: 0, 0, 0
    human = [bits("0111"), bits("110000")]
    measured = token_agreement(predicted, human)
    assert measured == pytest.approx(
        {
            "precision_macro": (1 / 2 + 0) / 2, "recall_macro": (1 / 3 + 0) / 2, "f1_macro": (2 / 5 + 0) / 2,
            "precision_micro": 1 / 2, "recall_micro": 1 / 5, "f1_micro": 2 / 7,
        }
    )  # fmt: skip


def test_macro_f1_of_tokens_is_not_the_f1_of_the_means() -> None:
    measured = token_agreement([bits("10"), bits("11")], [bits("11"), bits("10")])
    p, r = measured["precision_macro"], measured["recall_macro"]
    assert measured["f1_macro"] == pytest.approx(2 / 3)
    assert 2 * p * r / (p + r) == pytest.approx(3 / 4)


def test_iou_by_hand() -> None:
    predicted = [bits("11000110"), bits("1000")]
    human = [bits("11100011"), bits("0011")]
    # first: [0,2) with [0,3): 2/3, right; [5,7) with [6,8): 1/3, wrong. second: no overlap
    precision, recall = (1 / 2 + 0) / 2, (1 / 2 + 0) / 2
    measured = iou_f1(predicted, human)
    assert measured["iou_f1_macro"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert measured["iou_f1_micro"] == pytest.approx(2 * (1 / 3) * (1 / 3) / (2 / 3))


def test_iou_macro_is_the_f1_of_the_means() -> None:
    # first: P 1/2 (two spans, one right), R 1; second: P 1, R 1/2
    measured = iou_f1([bits("1101"), bits("11000")], [bits("1100"), bits("11011")])
    assert measured["iou_f1_macro"] == pytest.approx(0.75)  # the mean of the F1s would be 2/3


def test_an_iou_of_exactly_one_half_is_right() -> None:
    assert iou_f1([bits("1000")], [bits("1100")])["iou_f1_macro"] == 1.0
    assert iou_f1([bits("0100")], [bits("1110")])["iou_f1_macro"] == 0.0


def test_an_empty_prediction_is_wrong_not_missing() -> None:
    assert iou_f1([bits("00"), bits("11")], [bits("11"), bits("11")])["iou_f1_macro"] == pytest.approx(0.5)


def test_auprc_by_hand() -> None:
    # ranked: right, wrong, right; points (recall, precision) (0,1) (1/2,1) (1/2,1/2) (1,2/3)
    scores, human = [np.array([0.9, 0.5, 0.1])], [bits("101")]
    assert area_under_precision_recall(scores, human) == pytest.approx(1 / 2 + (1 / 2) * (1 / 2 + 2 / 3) / 2)
    assert area_under_precision_recall([np.zeros(4)], [bits("1111")]) == 1.0


def test_examples_without_a_human_rationale_are_counted_and_left_out() -> None:
    whole = plausibility([bits("10"), bits("11")], [np.ones(2), np.ones(2)], [bits("10"), bits("00")])
    assert (whole["examples"], whole["without_human_rationale"]) == (1, 1)
    assert whole["f1_macro"] == 1.0
    assert plausibility([bits("10")], [np.ones(2)], [bits("00")]) == {"examples": 0, "without_human_rationale": 1}


def test_a_word_is_marked_if_any_piece_is() -> None:
    continues = bits("00110")
    assert list(words_from_pieces(bits("00011"), continues)) == [False, True, True]
    assert list(words_from_pieces(np.array([-2.0, -3.0, 1.0, -1.0, 4.0]), continues)) == [-2.0, 1.0, 4.0]
    assert list(words_from_pieces(bits("01"), bits("11"))) == [True]  # a text that begins within a word
    assert not len(words_from_pieces(bits(""), bits("")))


def test_erasers_figures_by_hand() -> None:
    full = np.array([[0.9, 0.1], [0.3, 0.7]])
    reduced = np.array([[0.4, 0.6], [0.2, 0.8]])
    assert comprehensiveness(full, reduced) == pytest.approx([0.5, -0.1])  # of the class predicted on the full input
    assert sufficiency(full, full) == pytest.approx([0.0, 0.0])
    assert area_over_perturbation_curve([np.array([0.5, -0.1]), np.array([0.1, 0.1])]) == pytest.approx(0.15)


def test_top_share_takes_at_least_one_and_the_lower_index_first() -> None:
    scores = np.array([[5.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 9.0]])
    selectable = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=bool)
    assert top_share(scores, selectable, 0.01).tolist() == [[True, False, False, False], [True, False, False, False]]
    assert top_share(scores, selectable, 0.5).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert top_share(scores, selectable, 1.0).tolist() == selectable.tolist()
    assert not top_share(scores, np.zeros((2, 4), dtype=bool), 0.5).any()
