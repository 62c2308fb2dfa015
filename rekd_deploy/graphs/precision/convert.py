"""The pair in the precision that was asked for; int8 keeps a selector in float32 whose rationales it would change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import onnx

from rekd_deploy.contract.parity_report import MaskAgreement, Precision, limits_of
from rekd_deploy.contract.signature import PairSignature
from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.precision.half import to_half
from rekd_deploy.graphs.precision.integers import to_int8
from rekd_deploy.graphs.precision.observed import multiplications, observed_precision
from rekd_deploy.graphs.precision.structure import Structure, name_nodes
from rekd_deploy.runtimes.base import Arrays
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_train.inputs.preprocessors import Preprocessor

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HEAD_OUTPUTS = {"selector": "scores", "predictor": "logits"}
_CALIBRATED = 64
"""Examples that int8 is calibrated on; the gate runs on all of them."""
_BATCH_SIZE = 16


@dataclass
class Conversion:
    """The graphs of a pair in one precision."""

    models: dict[str, onnx.ModelProto]
    precisions: dict[str, Precision]
    """What each graph was to be, by role; 'fp32' where a selector was kept."""
    notes: dict[str, str] = field(default_factory=dict)
    """Why a graph is not of the precision that was asked for."""
    emulated: dict[str, onnx.ModelProto] = field(default_factory=dict)
    """Graphs of the same roundings in float32, where ONNX Runtime's CPU kernels lack the precision."""


def check_precision(precision: str) -> None:
    """Raise ExportError for what is none."""
    if precision not in PRECISIONS:
        raise ExportError(f"there is no precision '{precision}'; precisions: {', '.join(PRECISIONS)}")


def convert_pair(
    models: dict[str, onnx.ModelProto],
    precision: Precision,
    signature: PairSignature,
    heads: dict[str, int],
    preprocessor: Preprocessor,
    items: Sequence[Any],
    *,
    fused: bool,
    for_engine: bool = False,
) -> Conversion:
    """Convert the exported float32 graphs of a pair.

    Args:
        models: 'selector' and 'predictor'.
        heads: how many linear layers each one's head has; they stay float32.
        items: what int8 is calibrated on: texts or images.
        fused: the graphs are for ONNX Runtime alone.
        for_engine: engines are built from the graphs.

    Raises:
        ExportError: a graph cannot be converted.
    """
    if precision == "fp32":
        return Conversion(models, dict.fromkeys(models, "fp32"))
    models = {role: name_nodes(model) for role, model in models.items()}
    guarded = {role: Structure(model).guarded(HEAD_OUTPUTS[role], heads[role]) for role, model in models.items()}
    if precision == "int8":
        return _int8(models, guarded, signature, preprocessor, items, fused)
    converted = {
        role: to_half(model, precision, guarded[role], for_engine=for_engine) for role, model in models.items()
    }
    for role, model in converted.items():
        counts = multiplications(model)
        if observed_precision(counts, heads[role]) != precision:
            raise ExportError(
                f"the {role} cannot be made {precision}: its multiplications would be {counts}; fix: --precision fp32"
            )
    emulated = {}
    if precision == "bf16":
        emulated = {
            role: to_half(model, precision, guarded[role], emulated=True, for_engine=for_engine)
            for role, model in models.items()
        }
    return Conversion(converted, dict.fromkeys(models, precision), emulated=emulated)


def _int8(
    models: dict[str, onnx.ModelProto],
    guarded: dict[str, set[str]],
    signature: PairSignature,
    preprocessor: Preprocessor,
    items: Sequence[Any],
    fused: bool,
) -> Conversion:
    if not items:
        raise ExportError("int8 needs examples to calibrate on; fix: --parity-texts FILE")
    with OnnxRuntimeRunner(models["selector"].SerializeToString(), signature.selector, "the selector") as selector:
        singles = []
        for item in items[:: -(-len(items) // _CALIBRATED)]:
            inputs = without_padding(dict(preprocessor([item]).inputs))
            singles.append(inputs | selector.run(inputs))
        converted = {role: to_int8(model, guarded[role], singles, fused=fused) for role, model in models.items()}
        precisions: dict[str, Precision] = dict.fromkeys(models, "int8")
        notes = {}
        complaint = _mask_complaint(selector, converted["selector"], signature, _batches(preprocessor, items))
    if complaint:
        converted["selector"], precisions["selector"] = models["selector"], "fp32"
        notes["selector"] = f"fp32, since in int8 {complaint}"
    return Conversion(converted, precisions, notes)


def without_padding(inputs: Arrays) -> Arrays:
    """A batch of one text without its padding; images as they are."""
    if "attention_mask" not in inputs:
        return inputs
    length = int(inputs["attention_mask"].sum())
    return {name: array[:, :length] for name, array in inputs.items()}


def _batches(preprocessor: Preprocessor, items: Sequence[Any]) -> Iterator[Arrays]:
    for start in range(0, len(items), _BATCH_SIZE):
        yield dict(preprocessor(items[start : start + _BATCH_SIZE]).inputs)


def _mask_complaint(
    reference: OnnxRuntimeRunner, model: onnx.ModelProto, signature: PairSignature, batches: Iterator[Arrays]
) -> str | None:
    """What is wrong with the rationales of a converted selector, held against its own."""
    agreement = MaskAgreement()
    with OnnxRuntimeRunner(model.SerializeToString(), signature.selector, "the int8 selector") as selector:
        for inputs in batches:
            ours, theirs = reference.run(inputs)["mask"], selector.run(inputs)["mask"]
            real = inputs["attention_mask"] > 0 if "attention_mask" in inputs else np.ones_like(ours)
            agreement.add(ours, theirs, real)
    return "; ".join(agreement.complaints(limits_of("int8"))) or None
