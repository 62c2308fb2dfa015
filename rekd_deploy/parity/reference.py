"""The PyTorch model's answers, what is stored of them beside the graphs, and how close others come to them.

With the stored ones a repository can be verified where it is served, without torch and without the checkpoint.
``agreement`` compares finished predictions instead of tensors.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import RepositoryError
from rekd_deploy.parity.examples import constructed_inputs
from rekd_deploy.runtimes.base import Arrays
from rekd_train.inputs.policy import cut_margins
from rekd_train.inputs.prediction import Patch, Prediction

if TYPE_CHECKING:
    from rekd_deploy.contract.parity_report import ParityReport
    from rekd_train.models.rationalizer import Rationalizer

_REAL = 8
"""Real examples that are stored."""
_LARGEST = 1 << 20
"""Bytes of inputs that are stored, before compression."""
NEAR_TIE = 1e-5
"""Two predictions may differ at a position whose score lies this close to the cut."""


@dataclass(frozen=True)
class Case:
    """A batch of inputs and what the model answers: arrays (B, N), logits and probabilities (B, C) on its own mask.

    ``margins`` says how far each score is from its cut, ``real`` which positions are no padding.
    """

    inputs: Arrays
    scores: np.ndarray
    mask: np.ndarray
    margins: np.ndarray
    real: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray


def model_case(rationalizer: Rationalizer, inputs: Arrays) -> Case:
    """What the model answers to a batch of inputs."""
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.inference_mode():
        chosen = rationalizer.select(tensors)
        logits = rationalizer.class_logits(tensors, chosen.mask)
        probabilities = rationalizer.probabilities(logits)
    scores, selectable = chosen.scores.numpy(), rationalizer.selectable(tensors).numpy()
    margins = cut_margins(scores, selectable, rationalizer.policy)
    real = rationalizer.selector.backbone.real(tensors).numpy()
    return Case(inputs, scores, chosen.mask.numpy(), margins, real, logits.numpy(), probabilities.numpy())


def handed_over(signature: GraphSignature, mask: np.ndarray) -> Arrays:
    """What a predictor of this signature is handed for a rationale (B, N) bool, which fits into its slots."""
    shapes = {spec.name: signature.sizes_at(spec, mask.shape[1]) for spec in signature.inputs}
    return {"keep": mask} if "keep" in shapes else in_slots(mask, int(shapes["kept"][1]))


def in_slots(mask: np.ndarray, slots: int) -> Arrays:
    """``positions`` (B, slots) int64, ascending those that a mask (B, N) keeps, then 0; ``kept`` (B, slots) bool."""
    kept = np.arange(slots) < mask.sum(axis=1, keepdims=True)
    wide = np.pad(mask, ((0, 0), (0, max(0, slots - mask.shape[1]))))
    order = np.argsort(~wide, axis=1, kind="stable")[:, :slots]
    return {"positions": np.where(kept, order, 0), "kept": kept}


def record(rationalizer: Rationalizer, items: Sequence[Any], path: Path) -> Path:
    """Write the first real examples and the constructed rows with the model's answers; the same bytes every time."""
    # by twos, so that the limit of size leaves some
    pairs = (items[start : start + 2] for start in range(0, min(len(items), _REAL), 2))
    real = (rationalizer.preprocessor(pair).inputs for pair in pairs)
    constructed = constructed_inputs(rationalizer.preprocessor, rationalizer.policy, rationalizer.capacity)
    stored: Arrays = {}
    size = 0
    for number, inputs in enumerate(chain(real, constructed)):
        size += sum(array.nbytes for array in inputs.values())
        if number and size > _LARGEST:
            break
        case = model_case(rationalizer, inputs)
        own = {name: array for name, array in vars(case).items() if name != "inputs"}
        arrays = {f"inputs/{name}": array for name, array in inputs.items()} | own
        stored |= {f"{number:03}/{name}": array for name, array in arrays.items()}
    np.savez_compressed(path, **stored)
    return path


def read_cases(path: Path) -> list[Case]:
    """The stored cases.

    Raises:
        RepositoryError: the file is missing or damaged.
    """
    cases: dict[str, dict[str, Any]] = {}
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            for number, *place, name in (key.split("/") for key in stored.files):
                case = cases.setdefault(number, {"inputs": {}})
                (case["inputs"] if place else case)[name] = stored["/".join([number, *place, name])]
        return [Case(**cases[number]) for number in sorted(cases)]
    except FileNotFoundError:
        raise RepositoryError(f"{path} is missing; fix: copy the whole folder again or rekd-export") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RepositoryError(f"{path} is damaged: {error}; fix: copy the whole folder again or rekd-export") from None


@dataclass
class Agreement:
    """How far a graph is from the stored answers. Classes are compared in rows with the model's own rationale."""

    rows: int = 0
    score_difference: float = 0.0
    flipped_positions: int = 0
    """Positions decided otherwise than by the model."""
    wrong_flips: int = 0
    """Of those, the ones that are no near-ties."""
    positions: int = 0
    logit_difference: float = 0.0
    probability_difference: float = 0.0
    compared_classes: int = 0
    label_disagreements: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For --json; differences to three digits."""
        figures = asdict(self)
        return {name: float(f"{each:.3g}") if isinstance(each, float) else each for name, each in figures.items()}


def compare(
    role: str, answer: Callable[[Arrays], Arrays], signature: GraphSignature, cases: Sequence[Case], tie_margin: float
) -> Agreement:
    """Compare what ``answer`` gives for the graph of a role with the stored answers.

    Args:
        role: 'selector', 'predictor' (handed the model's own rationale) or 'single'.
        tie_margin: a flipped position is a near-tie when its score is at most this far from its cut.
    """
    agreement = Agreement()
    for case in cases:
        agreement.rows += len(case.mask)
        known = case.inputs | (handed_over(signature, case.mask) if role == "predictor" else {})
        answers = answer({spec.name: known[spec.name] for spec in signature.inputs})
        same = np.ones(len(case.mask), bool)
        if "scores" in answers:
            same = ~add_selection(agreement, case, answers, tie_margin).any(axis=1)
        if "logits" in answers:
            agreement.compared_classes += int(same.sum())
            add_classes(agreement, case, answers, same)
            labels = answers["logits"].argmax(1) != case.logits.argmax(1)
            agreement.label_disagreements += int(np.sum(labels & same))
    return agreement


def add_selection(found: Agreement | ParityReport, case: Case, answers: Arrays, tie_margin: float) -> np.ndarray:
    """Add how a graph selects to what was found; (B, N) bool, the positions that it decides otherwise."""
    flips = answers["mask"] != case.mask
    found.positions += int(case.real.sum())
    found.flipped_positions += int(flips.sum())
    found.wrong_flips += int(np.sum(flips & ~(case.margins <= tie_margin)))
    found.score_difference = _largest(found.score_difference, (answers["scores"] - case.scores)[case.real])
    return flips


def add_classes(found: Agreement | ParityReport, case: Case, answers: Arrays, rows: np.ndarray | slice) -> None:
    """Add how far the logits and probabilities of some rows are from the model's to what was found."""
    found.logit_difference = _largest(found.logit_difference, (answers["logits"] - case.logits)[rows])
    differences = (answers["probabilities"] - case.probabilities)[rows]
    found.probability_difference = _largest(found.probability_difference, differences)


def _largest(so_far: float, differences: np.ndarray) -> float:
    """Largest absolute difference; NaN stays NaN, so that it cannot pass."""
    return float(np.max(np.abs(differences), initial=so_far))


def complaints(agreement: Agreement, limits: Mapping[str, Any]) -> list[str]:
    """What is beyond ``parity_report.verification_limits`` of the manifest's parity report."""
    differences = {
        "a selector score": (agreement.score_difference, limits["scores"]),
        "a class logit": (agreement.logit_difference, limits["logits"]),
        "a probability": (agreement.probability_difference, limits["probabilities"]),
    }
    found = [
        f"{what} differs by {value:.3g} (limit {limit:g})"
        for what, (value, limit) in differences.items() if not value <= limit  # also true for NaN
    ]
    allowed = limits.get("flips", 0)
    if agreement.wrong_flips > allowed:
        found.append(f"{agreement.wrong_flips} mask positions are decided otherwise (limit {allowed} beyond near-ties)")
    return found


def agreement(ours: Sequence[Prediction], theirs: Sequence[Prediction], bias: float | None = None) -> int:
    """How many predictions agree: same label, same kept tokens or patches, probabilities within 1e-4.

    A kept one may differ only at a near-tie: its score lies within ``NEAR_TIE`` of the threshold, ``-bias`` where the
    decision rule has one, or it changed places with one whose score is that close to its own.
    """
    return sum(_agree(mine, other, bias) for mine, other in zip(ours, theirs, strict=True))


def _agree(mine: Prediction, other: Prediction, bias: float | None) -> bool:
    if mine.label != other.label or mine.truncated != other.truncated:
        return False
    if any(abs(p - other.probabilities[label]) > 1e-4 for label, p in mine.probabilities.items()):
        return False
    kept, theirs = _kept(mine), _kept(other)
    only_mine, only_theirs = (sorted(a[place] for place in a.keys() - b) for a, b in ((kept, theirs), (theirs, kept)))
    if not only_mine and not only_theirs:
        return _bounds(mine) == _bounds(other)
    at_threshold = bias is not None and all(abs(score + bias) <= NEAR_TIE for score in (*only_mine, *only_theirs))
    swapped = len(only_mine) == len(only_theirs) and np.allclose(only_mine, only_theirs, rtol=0, atol=NEAR_TIE)
    return at_threshold or swapped


def _kept(prediction: Prediction) -> dict[tuple[int, ...], float]:
    """Score of each kept token or patch, by its place in the input."""
    patches = {(part.row, part.column): part.score for part in prediction.rationale if isinstance(part, Patch)}
    return patches or {(piece.position,): piece.score for piece in prediction.pieces}


def _bounds(prediction: Prediction) -> list[tuple[int, ...]]:
    return [part.box if isinstance(part, Patch) else (part.start, part.end) for part in prediction.rationale]
