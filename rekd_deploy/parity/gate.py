"""The gate of every export: the PyTorch model against the graphs that would be served.

A mask is compared position by position: a flipped position is tolerated only where the reference score lies within
``tie_margin`` of its cut, or, in a lower precision, where few enough are flipped. Logits are compared on the *same*
mask, the graph's; classes and accuracy end to end, each on its own mask. The decision inside the selector's graph is
also compared with the written specification, exactly: on the graph's own scores everywhere, and on scores constructed
to tie. The sessions are those of the target: its options, its threads where the export sets them, and the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from rekd_deploy.parity.reference import Case, add_classes, add_selection, in_slots, model_case
from rekd_deploy.runtimes.base import Arrays, Graph
from rekd_deploy.runtimes.onnxruntime_device import chain_on
from rekd_train.inputs.policy import mask_by_specification
from rekd_train.models.rationalizer import Rationalizer

_BATCH_SIZE = 16


def check_parity(
    rationalizer: Rationalizer, paths: Mapping[str, Path], examples: Examples, limits: ParityLimits | None = None,
    **sessions: Any,
) -> ParityReport:
    """Run the gate on ONNX files.

    Args:
        paths: by role: 'selector' and 'predictor', in this order, or 'single', both steps in one file.
        limits: ``parity_report.limits_of`` the precision; None: fp32's.
        sessions: ``device`` of ``chain_on``; on the CPU also ``target`` and ``threads`` of what will serve the graphs.

    Raises:
        ParityError: names the figures and their limits; the graphs must not be published.
        EngineError: there is no such device, or it cannot run the graphs.
        InputError: an example cannot be used.
    """
    signature = pair_signature(rationalizer)
    graphs = [Graph(path, signature.graph(role), path.name) for role, path in paths.items()]
    report = ParityReport(examples.source, limits or ParityLimits(), sessions.get("device", "cpu"))
    rationalizer.eval()
    with chain_on(graphs, **sessions) as chain:
        for start in range(0, len(examples.items), _BATCH_SIZE):
            some = slice(start, start + _BATCH_SIZE)
            case = model_case(rationalizer, rationalizer.preprocessor(examples.items[some]).inputs)
            answers = chain.run(case.inputs)
            report.examples += len(case.mask)
            flips, disagreements = _compare(rationalizer, case, answers, report)
            # not on constructed inputs: alike patches tie exactly where a network knows no absolute positions
            report.near_ties += int(np.sum(flips & (case.margins <= report.limits.tie_margin)))
            report.example_disagreements += disagreements
            report.masks.add(case.mask, answers["mask"], case.real)
            if examples.labels is not None:
                labels = np.array(examples.labels[some])
                report.labelled += len(labels)
                report.model_correct += int(np.sum(case.logits.argmax(1) == labels))
                report.graphs_correct += int(np.sum(answers["logits"].argmax(1) == labels))
        for inputs in constructed_inputs(rationalizer.preprocessor, rationalizer.policy, rationalizer.capacity):
            case = model_case(rationalizer, inputs)
            report.constructed_rows += len(case.mask)
            _compare(rationalizer, case, chain.run(inputs), report)
    _check_decision(rationalizer, graphs[0], report, sessions)
    if complaints := report.failures():
        fix = "; fix: a higher precision, --precision fp32 at best" if report.limits != ParityLimits() else ""
        raise ParityError("the graphs are not the model and are not published: " + "; ".join(complaints) + fix)
    return report


@torch.inference_mode()
def _compare(
    rationalizer: Rationalizer, case: Case, answers: Arrays, report: ParityReport
) -> tuple[np.ndarray, int]:
    """Add a batch to the report; which positions are flipped (B, N), and how many rows are put into another class."""
    flips = add_selection(report, case, answers, report.limits.tie_margin)
    _check_rule(rationalizer, case.inputs, answers["scores"], answers, report)
    same = case
    if flips.any():
        tensors = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
        logits = rationalizer.class_logits(tensors, torch.from_numpy(answers["mask"]))
        same = replace(case, logits=logits.numpy(), probabilities=rationalizer.probabilities(logits).numpy())
    add_classes(report, same, answers, slice(None))
    disagreements = int(np.sum(answers["logits"].argmax(1) != case.logits.argmax(1)))
    report.label_disagreements += disagreements
    return flips, disagreements


def _check_rule(rationalizer: Rationalizer, inputs: Arrays, scores: Any, chosen: Arrays, report: ParityReport) -> None:
    """Count where what a graph chose by scores (B, N) is not what the specification says."""
    selectable = rationalizer.selectable({name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
    expected = mask_by_specification(scores, selectable, rationalizer.policy)
    report.rule_violations += int(np.sum(chosen["mask"] != expected))
    report.handover_violations += wrong_handovers(chosen)


def wrong_handovers(chosen: Arrays) -> int:
    """Rows whose hand-over does not say what their ``mask`` says.

    ``positions`` and ``kept`` are the mask's positions, ascending, then empty slots at 0; ``keep`` is the mask.
    """
    if "keep" in chosen:
        return int(np.sum((chosen["keep"] != chosen["mask"]).any(axis=1)))
    if "positions" not in chosen:  # both steps are in one graph
        return 0
    slots = chosen["kept"].shape[1]
    wrong = chosen["mask"].sum(axis=1) > slots
    for name, expected in in_slots(chosen["mask"], slots).items():
        wrong |= (chosen[name] != expected).any(axis=1)
    return int(wrong.sum())


def _check_decision(rationalizer: Rationalizer, graph: Graph, report: ParityReport, sessions: dict[str, Any]) -> None:
    """Feed constructed scores to the very decision that is in the graph's file."""
    signature = graph.signature
    scores, *others = signature.outputs
    decided = tuple(spec for spec in others if spec.name not in ("logits", "probabilities"))
    part = decision_graph(onnx.load(graph.model), signature.inputs, decided).SerializeToString()
    interface = GraphSignature((scores, *signature.inputs), decided, signature.slots)
    with chain_on([Graph(part, interface, f"the decision of {graph.name}")], **sessions) as decision:
        for inputs in constructed_scores(rationalizer.preprocessor, rationalizer.policy, rationalizer.capacity):
            report.constructed_rows += len(inputs["scores"])
            _check_rule(rationalizer, inputs, inputs["scores"], decision.run(inputs), report)
