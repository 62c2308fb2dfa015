"""Do two ways to a prediction agree? Label, probabilities and the kept words or patches, near-ties allowed for."""

from __future__ import annotations

from collections.abc import Sequence

from rekd_train.inputs.prediction import Patch, Prediction

NEAR_TIE = 1e-5
"""Two masks may differ at a position whose score lies this close to the cut."""


def agreement(
    ours: Sequence[Prediction], theirs: Sequence[Prediction], bias: float | None = None, tolerance: float = 1e-4
) -> int:
    """How many answers agree: same label, same kept tokens or patches, probabilities within ``tolerance``.

    A kept one may differ only at a near-tie: its score lies within ``NEAR_TIE`` of the threshold, or it
    changed places with one whose score is that close to its own.

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
        return _places(mine) == _places(other)
    at_threshold = bias is not None and all(abs(s + bias) <= NEAR_TIE for s in (*only_mine, *only_other))
    swapped = len(only_mine) == len(only_other) and all(
        abs(a - b) <= NEAR_TIE for a, b in zip(only_mine, only_other, strict=True)
    )
    return at_threshold or swapped


def _differences(mine: Prediction, other: Prediction) -> list[float]:
    """Scores, ascending, of the tokens or patches that only ``mine`` keeps."""
    theirs = _kept(other).keys()
    return sorted(score for position, score in _kept(mine).items() if position not in theirs)


def _kept(prediction: Prediction) -> dict[tuple[int, ...], float]:
    """Score of each kept token or patch, by its place in the input."""
    patches = {(part.row, part.column): part.score for part in prediction.rationale if isinstance(part, Patch)}
    return patches or {(piece.position,): piece.score for piece in prediction.pieces}


def _places(prediction: Prediction) -> list[tuple[int, ...]]:
    return [part.box if isinstance(part, Patch) else (part.start, part.end) for part in prediction.rationale]
