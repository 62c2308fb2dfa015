"""When do two predictions count as the same?"""

from dataclasses import replace

import pytest

from rekd_deploy.parity.reference import agreement
from rekd_train.inputs.prediction import Patch, Piece, Prediction, Span


def text(*scores: float, probability: float = 0.9) -> Prediction:
    """One kept token a score; position i has scores[i]; 0 stands for a token that is not kept."""
    pieces = [Piece(2 * i, 2 * i + 1, "x", i, score) for i, score in enumerate(scores) if score]
    spans = [Span(piece.start, piece.end, "x", piece.score) for piece in pieces]
    return Prediction("good", {"good": probability, "bad": 1 - probability}, spans, 0.1, False, pieces=pieces)


def image(*scores: float) -> Prediction:
    """The same of patches in row 0."""
    patches = [Patch(0, i, (i, 0, i + 1, 1), score) for i, score in enumerate(scores) if score]
    return Prediction("shoe", {"shoe": 1.0}, patches, 0.1, False)


TWO = text(1, 2)


@pytest.mark.parametrize(("mine", "other", "bias", "agrees"), [
    (TWO, text(1, 2), None, True),
    (TWO, replace(TWO, label="bad"), None, False),
    (TWO, replace(TWO, truncated=True), None, False),
    (TWO, replace(TWO, rationale=TWO.rationale[:1]), None, False),
    (TWO, text(1, 2, probability=0.9002), None, False),
    (TWO, text(1, 2, probability=0.90005), None, True),
    (text(3, 2, 1), text(3, 2, 0), 0.5, False),  # the lowest one is missing
    (text(3, 0.500001), text(3, 0), -0.5, True),  # at the threshold
    (text(3, 0.51), text(3, 0), -0.5, False),
    (text(3, 1, 0), text(3, 0, 1.000001), None, True),  # almost equal scores have changed places
    (text(3, 1, 0), text(3, 0, 1.1), None, False),
    (image(3, 1), image(3, 1), None, True),
    (image(3, 1, 0), image(3, 0, 1.000001), None, True),
    (image(3, 1, 0), image(3, 0, 1.1), None, False),
    (image(3, 1), image(3, 0), 0.5, False),
])
def test_predictions_agree_up_to_near_ties(mine, other, bias, agrees):
    assert agreement([mine], [other], bias=bias) == agrees
