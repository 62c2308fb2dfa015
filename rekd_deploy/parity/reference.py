"""A few inputs with the PyTorch model's answers, stored beside the graphs.

With them a repository can be verified on the machine that serves it, without torch and without the checkpoint.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import RepositoryError
from rekd_deploy.parity.examples import constructed_inputs
from rekd_deploy.runtimes.base import Arrays

if TYPE_CHECKING:
    from rekd_train.models.rationalizer import Rationalizer

_REAL = 8
"""Real examples that are stored."""
_LARGEST = 1 << 20
"""Bytes of inputs that are stored, before compression."""
_ANSWERS = ("scores", "mask", "margins", "real", "logits", "probabilities")


@dataclass(frozen=True)
class Case:
    """A batch of inputs and what the model answers."""

    inputs: Arrays
    scores: np.ndarray
    """(B, N) float32."""
    mask: np.ndarray
    """(B, N) bool, the model's own rationale."""
    margins: np.ndarray
    """(B, N) float32, how far each score is from its cut."""
    real: np.ndarray
    """(B, N) bool, positions that are no padding."""
    logits: np.ndarray
    """(B, C) float32, on that mask."""
    probabilities: np.ndarray
    """(B, C) float32, on that mask."""

    def handover(self, signature: GraphSignature) -> Arrays:
        """What the predictor of this signature is handed for the model's own rationale."""
        return handed_over(signature, self.mask)


def handed_over(signature: GraphSignature, mask: np.ndarray) -> Arrays:
    """What a predictor of this signature is handed for a rationale.

    Args:
        mask: (B, N) bool; for a compacted predictor with at most as many kept as it has slots.
    """
    shapes = {spec.name: spec.shape for spec in signature.inputs}
    if "keep" in shapes:
        return {"keep": mask}
    rule = signature.slots
    slots = int(shapes["kept"][1]) if rule is None else rule.at(mask.shape[1])
    positions = np.zeros((len(mask), slots), np.int64)
    kept = np.zeros((len(mask), slots), bool)
    for row, each in enumerate(mask):
        chosen = np.flatnonzero(each)
        positions[row, : len(chosen)], kept[row, : len(chosen)] = chosen, True
    return {"positions": positions, "kept": kept}


@dataclass
class Agreement:
    """How far a graph is from the stored answers."""

    rows: int = 0
    score_difference: float = 0.0
    flipped_positions: int = 0
    """Positions decided otherwise than by the model, near-ties included."""
    wrong_flips: int = 0
    """Of those, the ones that are no near-ties."""
    positions: int = 0
    logit_difference: float = 0.0
    probability_difference: float = 0.0
    compared_classes: int = 0
    """Rows whose classes were compared: those with the model's own rationale."""
    label_disagreements: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For --json; differences to three digits."""
        return {
            name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in asdict(self).items()
        }


def record(rationalizer: Rationalizer, items: Sequence[Any], path: Path) -> Path:
    """Write the first real examples and the constructed rows with the model's answers; the same bytes every time."""
    import torch

    from rekd_train.inputs.policy import cut_margins

    stored: Arrays = {}
    for number, inputs in enumerate(_within_size(_inputs(rationalizer, items))):
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.inference_mode():
            chosen = rationalizer.select(tensors)
            logits = rationalizer.class_logits(tensors, chosen.mask)
        selectable = rationalizer.selectable(tensors).numpy()
        answers = {
            "scores": chosen.scores.numpy(),
            "mask": chosen.mask.numpy(),
            "margins": cut_margins(chosen.scores.numpy(), selectable, rationalizer.policy),
            "real": rationalizer.selector.backbone.real(tensors).numpy(),
            "logits": logits.numpy(),
            "probabilities": rationalizer.probabilities(logits).numpy(),
        }
        stored |= {f"{number:03}/inputs/{name}": array for name, array in inputs.items()}
        stored |= {f"{number:03}/{name}": answers[name] for name in _ANSWERS}
    np.savez_compressed(path, **stored)
    return path


def _inputs(rationalizer: Rationalizer, items: Sequence[Any]) -> Iterator[Arrays]:
    for start in range(0, min(len(items), _REAL), 2):  # by twos, so that the limit of size leaves some
        yield rationalizer.preprocessor(items[start : start + 2]).inputs
    yield from constructed_inputs(rationalizer.preprocessor, rationalizer.policy, rationalizer.capacity)


def _within_size(batches: Iterator[Arrays]) -> Iterator[Arrays]:
    size = 0
    for number, inputs in enumerate(batches):
        size += sum(array.nbytes for array in inputs.values())
        if number and size > _LARGEST:
            return
        yield inputs


def read_cases(path: Path) -> list[Case]:
    """The stored cases.

    Raises:
        RepositoryError: the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        numbers = sorted({name.partition("/")[0] for name in arrays})
        return [
            Case(
                {key.rpartition("/")[2]: array for key, array in arrays.items() if key.startswith(f"{number}/inputs/")},
                *(arrays[f"{number}/{name}"] for name in _ANSWERS),
            )
            for number in numbers
        ]
    except FileNotFoundError:
        raise RepositoryError(f"{path} is missing; fix: copy the whole folder again or rekd-export") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RepositoryError(f"{path} is damaged: {error}; fix: copy the whole folder again or rekd-export") from None


def compare(
    role: str, answer: Callable[[Arrays], Arrays], signature: GraphSignature, cases: Sequence[Case], tie_margin: float
) -> Agreement:
    """Hold the graph of a role against the stored answers.

    Args:
        role: 'selector', 'predictor' (handed the model's own rationale) or 'single'.
        answer: runs the graph.
        signature: of the graph.
        tie_margin: a flipped position is a near-tie when its score is at most this far from its cut.
    """
    agreement = Agreement()
    for case in cases:
        agreement.rows += len(case.mask)
        known = case.inputs | (case.handover(signature) if role == "predictor" else {})
        answers = answer({spec.name: known[spec.name] for spec in signature.inputs})
        same = np.ones(len(case.mask), bool)
        if "scores" in answers:
            flips = answers["mask"] != case.mask
            same = ~flips.any(axis=1)
            agreement.positions += int(case.real.sum())
            agreement.flipped_positions += int(flips.sum())
            agreement.wrong_flips += int(np.sum(flips & ~(case.margins <= tie_margin)))
            agreement.score_difference = _largest(
                agreement.score_difference, (answers["scores"] - case.scores)[case.real]
            )
        if "logits" in answers:
            agreement.compared_classes += int(same.sum())
            agreement.logit_difference = _largest(agreement.logit_difference, (answers["logits"] - case.logits)[same])
            agreement.probability_difference = _largest(
                agreement.probability_difference, (answers["probabilities"] - case.probabilities)[same]
            )
            labels = answers["logits"].argmax(1) != case.logits.argmax(1)
            agreement.label_disagreements += int(np.sum(labels & same))
    return agreement


def complaints(agreement: Agreement, limits: Mapping[str, Any]) -> list[str]:
    """What is beyond ``parity_report.verification_limits`` of the manifest's parity report."""
    found = [
        f"{what} differs by {value:.3g} (limit {limits[limit]:g})"
        for what, value, limit in (
            ("a selector score", agreement.score_difference, "scores"),
            ("a class logit", agreement.logit_difference, "logits"),
            ("a probability", agreement.probability_difference, "probabilities"),
        )
        if not value <= limits[limit]  # also true for NaN
    ]
    allowed = limits.get("flips", 0)
    if agreement.wrong_flips > allowed:
        found.append(f"{agreement.wrong_flips} mask positions are decided otherwise (limit {allowed} beyond near-ties)")
    return found


def _largest(so_far: float, differences: np.ndarray) -> float:
    """Largest absolute difference; NaN stays NaN, so that it cannot pass."""
    return float(np.max(np.abs(differences), initial=so_far))
