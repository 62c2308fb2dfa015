"""The gate of every export: the PyTorch model against the graphs that would be served.

A mask is discrete, so it is compared position by position: a flipped position is tolerated only where the
reference score lies within ``tie_margin`` of its cut, or, in a lower precision, where few enough are flipped.
Logits are compared on the *same* mask, the graph's; classes and accuracy end to end, each on its own mask.
The decision inside the selector's graph is also compared with the written specification, exactly:
on the graph's own scores everywhere, and on scores constructed to tie (rekd_deploy.parity.examples).
The sessions are those of the target: its options, its threads where the export sets them, and the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from rekd_deploy.contract.parity_report import ParityLimits, ParityReport
from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import ParityError
from rekd_deploy.graphs.guard import decision_graph
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.parity.examples import Examples, constructed_inputs, constructed_scores
from rekd_deploy.runtimes.base import Arrays, Graph
from rekd_deploy.runtimes.onnxruntime_device import chain_on
from rekd_train.inputs.policy import cut_margins, mask_by_specification
from rekd_train.models.rationalizer import Rationalizer

_BATCH_SIZE = 16
_LISTED = 20
"""Near-ties that are listed one by one; all are counted."""


def check_parity(
    rationalizer: Rationalizer,
    selector: Path,
    predictor: Path,
    examples: Examples,
    limits: ParityLimits | None = None,
    **sessions: Any,
) -> ParityReport:
    """Run the gate on the two ONNX files of a pair.

    Args:
        limits: ``parity_report.limits_of`` the precision; None: fp32's.
        sessions: ``device`` of ``chain_on``; on the CPU also ``target`` and ``threads`` of what will serve the graphs.

    Raises:
        ParityError: names the figures and their limits; the graphs must not be published.
        EngineError: there is no such device, or it cannot run the graphs.
        InputError: an example cannot be used.
    """
    signature = pair_signature(rationalizer)
    pair = ((selector, signature.selector), (predictor, signature.predictor))
    with chain_on([Graph(path, graph, path.name) for path, graph in pair], **sessions) as chain:
        return _gate(rationalizer, chain.run, selector, signature.selector, examples, limits, sessions)


def check_single_parity(
    rationalizer: Rationalizer,
    single: Path,
    examples: Examples,
    limits: ParityLimits | None = None,
    **sessions: Any,
) -> ParityReport:
    """Run the gate on the ONNX file of both steps; arguments and errors as ``check_parity``."""
    signature = pair_signature(rationalizer).ensemble
    with chain_on([Graph(single, signature, single.name)], **sessions) as chain:
        return _gate(rationalizer, chain.run, single, signature, examples, limits, sessions)


def _gate(
    rationalizer: Rationalizer,
    answer: Callable[[Arrays], Arrays],
    deciding: Path,
    signature: GraphSignature,
    examples: Examples,
    limits: ParityLimits | None,
    sessions: Mapping[str, Any],
) -> ParityReport:
    """Compare; ``deciding`` is the file, of that signature, that holds the decision rule."""
    report = ParityReport(examples.source, limits or ParityLimits(), sessions.get("device", "cpu"))
    rationalizer.eval()
    for inputs, labels in _batches(rationalizer, examples):
        report.examples += len(next(iter(inputs.values())))
        _compare_example(rationalizer, answer, inputs, labels, report)
    for inputs in constructed_inputs(rationalizer.preprocessor, rationalizer.policy, rationalizer.capacity):
        report.constructed_rows += len(next(iter(inputs.values())))
        _compare(rationalizer, answer, inputs, report)
    _check_decision(rationalizer, deciding, signature, report, sessions)
    if complaints := report.failures():
        fix = "; fix: a higher precision, --precision fp32 at best" if report.limits != ParityLimits() else ""
        raise ParityError("the graphs are not the model and are not published: " + "; ".join(complaints) + fix)
    return report


def _batches(rationalizer: Rationalizer, examples: Examples) -> Iterator[tuple[Arrays, np.ndarray | None]]:
    for start in range(0, len(examples.items), _BATCH_SIZE):
        some = slice(start, start + _BATCH_SIZE)
        labels = None if examples.labels is None else np.array(examples.labels[some])
        yield rationalizer.preprocessor(examples.items[some]).inputs, labels


def _compare_example(
    rationalizer: Rationalizer, answer: Callable[[Arrays], Arrays], inputs: Arrays, labels: np.ndarray | None,
    report: ParityReport,
) -> None:
    before = report.label_disagreements
    ours, theirs = _compare(rationalizer, answer, inputs, report)
    report.example_disagreements += report.label_disagreements - before
    report.masks.add(ours["mask"], theirs["mask"], ours["real"])
    if labels is not None:
        report.labelled += len(labels)
        report.model_correct += int(np.sum(ours["classes"] == labels))
        report.graphs_correct += int(np.sum(theirs["logits"].argmax(1) == labels))


@torch.inference_mode()
def _compare(
    rationalizer: Rationalizer, answer: Callable[[Arrays], Arrays], inputs: Arrays, report: ParityReport
) -> tuple[Arrays, Arrays]:
    """Add a batch to the report; the model's mask, real positions and classes, and the graphs' answers."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    reference = rationalizer.select(tensors)
    reference_scores, reference_mask = reference.scores.numpy(), reference.mask.numpy()
    selectable = rationalizer.selectable(tensors).numpy()
    answers = answer(inputs)
    real = rationalizer.selector.backbone.real(tensors).numpy()
    report.positions += int(real.sum())
    report.score_difference = _largest(report.score_difference, (answers["scores"] - reference_scores)[real])

    flips = answers["mask"] != reference_mask
    if flips.any():
        _count_flips(flips, cut_margins(reference_scores, selectable, rationalizer.policy), reference_scores, report)
    report.rule_violations += int(
        np.sum(answers["mask"] != mask_by_specification(answers["scores"], selectable, rationalizer.policy))
    )
    report.handover_violations += wrong_handovers(answers)

    logits = rationalizer.class_logits(tensors, torch.from_numpy(answers["mask"]))
    probabilities = rationalizer.probabilities(logits).numpy()
    report.logit_difference = _largest(report.logit_difference, answers["logits"] - logits.numpy())
    report.probability_difference = _largest(report.probability_difference, answers["probabilities"] - probabilities)
    own = logits if not flips.any() else rationalizer.class_logits(tensors, reference.mask)
    classes = own.numpy().argmax(1)
    report.label_disagreements += int(np.sum(answers["logits"].argmax(1) != classes))
    return {"mask": reference_mask, "real": real, "classes": classes}, answers


def _count_flips(flips: np.ndarray, margins: np.ndarray, scores: np.ndarray, report: ParityReport) -> None:
    tied = flips & (margins <= report.limits.tie_margin)
    report.flipped_positions += int(flips.sum())
    report.near_ties += int(tied.sum())
    report.wrong_flips += int(np.sum(flips & ~tied))
    for row, position in np.argwhere(tied)[: max(0, _LISTED - len(report.near_tie_list))]:
        report.near_tie_list.append(
            {
                "row": report.examples + report.constructed_rows - len(flips) + int(row),
                "position": int(position),
                "score": float(f"{scores[row, position]:.6g}"),
                "margin": float(f"{margins[row, position]:.3g}"),
            }
        )


def wrong_handovers(chosen: Arrays) -> int:
    """Rows whose hand-over does not say what their ``mask`` says.

    ``positions`` and ``kept`` are the mask's positions, ascending, then empty slots at 0; ``keep`` is the mask.
    """
    if "keep" in chosen:
        return int(np.sum((chosen["keep"] != chosen["mask"]).any(axis=1)))
    if "positions" not in chosen:  # both steps are in one graph
        return 0
    wrong = 0
    for mask, positions, kept in zip(chosen["mask"], chosen["positions"], chosen["kept"], strict=True):
        expected = np.flatnonzero(mask)
        used = np.arange(len(kept)) < len(expected)
        same = len(expected) <= len(kept) and (kept == used).all() and not positions[~used].any()
        wrong += not (same and (positions[used] == expected).all())
    return wrong


def _check_decision(
    rationalizer: Rationalizer,
    deciding: Path,
    signature: GraphSignature,
    report: ParityReport,
    sessions: Mapping[str, Any],
) -> None:
    """Feed constructed scores to the very decision that is in the file."""
    scores_spec, *others = signature.outputs
    decided = tuple(spec for spec in others if spec.name not in ("logits", "probabilities"))
    part = decision_graph(onnx.load(deciding), signature.inputs, decided)
    interface = GraphSignature((scores_spec, *signature.inputs), decided, signature.slots)
    cases = constructed_scores(rationalizer.preprocessor, rationalizer.policy, rationalizer.capacity)
    name = f"the decision of {deciding.name}"
    with chain_on([Graph(part.SerializeToString(), interface, name)], **sessions) as decision:
        for inputs in cases:
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            selectable = rationalizer.selectable(tensors).numpy()
            chosen = decision.run(inputs)
            expected = mask_by_specification(inputs["scores"], selectable, rationalizer.policy)
            report.constructed_rows += len(expected)
            report.rule_violations += int(np.sum(chosen["mask"] != expected))
            report.handover_violations += wrong_handovers(chosen)


def _largest(so_far: float, differences: np.ndarray) -> float:
    """Largest absolute difference; NaN stays NaN, so that it cannot pass."""
    return float(np.max(np.abs(differences), initial=so_far))
