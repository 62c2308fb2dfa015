"""Do two roads to an answer agree? Label, probabilities and the kept words, near-ties allowed for."""

from __future__ import annotations

from collections.abc import Sequence

from rekd_train.prediction import Prediction

NEAR_TIE = 1e-5
"""Two masks may differ at a position whose score lies this close to the cut."""


def agreement(
    ours: Sequence[Prediction], theirs: Sequence[Prediction], bias: float | None = None, tolerance: float = 1e-4
) -> int:
    """How many answers agree: same label, same kept tokens, probabilities within ``tolerance``.

    A kept token may differ only at a near-tie: its score lies within ``NEAR_TIE`` of the threshold, or it
    changed places with a token whose score is that close to its own.

    Args:
        bias: of the decision rule; its threshold is at ``-bias``. None: no threshold.
    """
    return sum(_agree(mine, other, bias, tolerance) for mine, other in zip(ours, theirs, strict=True))


def _agree(mine: Prediction, other: Prediction, bias: float | None, tolerance: float) -> bool:
    if mine.label != other.label or mine.truncated != other.truncated:
        return False
    if any(abs(p - other.probabilities[label]) > tolerance for label, p in mine.probabilities.items()):
        return False
    only_mine, only_other = _differences(mine, other), _differences(other, mine)
    if not only_mine and not only_other:
        return [(s.start, s.end) for s in mine.rationale] == [(s.start, s.end) for s in other.rationale]
    at_threshold = bias is not None and all(abs(s + bias) <= NEAR_TIE for s in (*only_mine, *only_other))
    swapped = len(only_mine) == len(only_other) and all(
        abs(a - b) <= NEAR_TIE for a, b in zip(only_mine, only_other, strict=True)
    )
    return at_threshold or swapped


def _differences(mine: Prediction, other: Prediction) -> list[float]:
    """Scores, ascending, of the tokens that only ``mine`` keeps."""
    theirs = {piece.position for piece in other.pieces}
    return sorted(piece.score for piece in mine.pieces if piece.position not in theirs)
