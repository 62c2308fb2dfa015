"""When do two answers count as the same?"""

from __future__ import annotations

from dataclasses import replace

from rekd_deploy.parity.reference import agreement
from rekd_train.inputs.prediction import Patch, Piece, Prediction, Span


def prediction(*scores: float, probability: float = 0.9, label: str = "good") -> Prediction:
    """One kept token a score; position i has scores[i]; 0 stands for a token that is not kept."""
    pieces = [Piece(2 * i, 2 * i + 1, "x", i, score) for i, score in enumerate(scores) if score]
    spans = [Span(piece.start, piece.end, "x", piece.score) for piece in pieces]
    return Prediction(label, {"good": probability, "bad": 1 - probability}, spans, 0.1, False, pieces=pieces)


def test_equal_answers_agree():
    assert agreement([prediction(1, 2)], [prediction(1, 2)]) == 1


def test_another_label_or_probability_does_not_agree():
    assert agreement([prediction(1)], [prediction(1, label="bad")]) == 0
    assert agreement([prediction(1)], [prediction(1, probability=0.9002)]) == 0
    assert agreement([prediction(1)], [prediction(1, probability=0.90005)]) == 1


def test_a_missing_token_does_not_agree_though_it_is_the_lowest():
    assert agreement([prediction(3, 2, 1)], [prediction(3, 2, 0)], bias=0.5) == 0


def test_a_token_at_the_threshold_may_differ():
    assert agreement([prediction(3, 0.500001)], [prediction(3, 0)], bias=-0.5) == 1
    assert agreement([prediction(3, 0.51)], [prediction(3, 0)], bias=-0.5) == 0


def test_tokens_of_almost_equal_score_may_change_places():
    assert agreement([prediction(3, 1, 0)], [prediction(3, 0, 1.000001)]) == 1
    assert agreement([prediction(3, 1, 0)], [prediction(3, 0, 1.1)]) == 0


def test_the_same_tokens_with_other_spans_do_not_agree():
    mine = prediction(1, 2)
    assert agreement([mine], [replace(mine, rationale=mine.rationale[:1])]) == 0


def image_prediction(*scores: float) -> Prediction:
    """One kept patch a score, in row 0; 0 stands for a patch that is not kept."""
    patches = [Patch(0, i, (i, 0, i + 1, 1), score) for i, score in enumerate(scores) if score]
    return Prediction("shoe", {"shoe": 1.0}, patches, 0.1, False)


def test_patches_are_held_against_each_other_like_tokens():
    assert agreement([image_prediction(3, 1)], [image_prediction(3, 1)]) == 1
    assert agreement([image_prediction(3, 1, 0)], [image_prediction(3, 0, 1.000001)]) == 1
    assert agreement([image_prediction(3, 1, 0)], [image_prediction(3, 0, 1.1)]) == 0
    assert agreement([image_prediction(3, 1)], [image_prediction(3, 0)], bias=0.5) == 0
