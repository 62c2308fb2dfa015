"""The pair in the requested precision, and which precision a finished graph has, counted from its weights.

int8 keeps a selector in float32 whose rationales it would change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from onnx import TensorProto

from rekd_deploy.contract.parity_report import MaskAgreement, Precision, limits_of
from rekd_deploy.contract.signature import PairSignature
from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.onnx_model import Structure
from rekd_deploy.graphs.precision.half import to_half
from rekd_deploy.graphs.precision.int8 import to_int8
from rekd_deploy.graphs.precision.structure import guarded_nodes, name_nodes
from rekd_deploy.runtimes.base import Arrays
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_train.inputs.preprocessors import Preprocessor

_NAMES = {
    TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.INT8: "int8",
}
_MULTIPLYING = {"MatMul", "Gemm", "Conv", "LSTM", "Attention", "MatMulIntegerToFloat"}
"""Operators whose second input is a weight."""
_PASSED_ON = {"Concat", "DequantizeLinear", "Transpose", "Reshape", "Cast"}
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
    """Why a graph is not of the requested precision."""
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
    guarded = {role: guarded_nodes(model, HEAD_OUTPUTS[role], heads[role]) for role, model in models.items()}
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
    emulated = {
        role: to_half(model, precision, guarded[role], emulated=True, for_engine=for_engine)
        for role, model in models.items() if precision == "bf16"
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
        batches = (preprocessor(items[at : at + _BATCH_SIZE]).inputs for at in range(0, len(items), _BATCH_SIZE))
        complaint = _mask_complaint(selector, converted["selector"], signature, batches)
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


def _mask_complaint(
    reference: OnnxRuntimeRunner, model: onnx.ModelProto, signature: PairSignature, batches: Iterator[Arrays]
) -> str | None:
    """What is wrong with the rationales of a converted selector, compared with its own."""
    agreement = MaskAgreement()
    with OnnxRuntimeRunner(model.SerializeToString(), signature.selector, "the int8 selector") as selector:
        for inputs in batches:
            ours, theirs = reference.run(inputs)["mask"], selector.run(inputs)["mask"]
            real = inputs["attention_mask"] > 0 if "attention_mask" in inputs else np.ones_like(ours)
            agreement.add(ours, theirs, real)
    return "; ".join(agreement.complaints(limits_of("int8"))) or None


def multiplications(model: onnx.ModelProto) -> dict[str, int]:
    """How many multiplications by weights a graph holds in each precision: {"fp16": 12, "fp32": 1}."""
    structure = Structure(model)
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in _MULTIPLYING:
            name = node.input[1]
            while name in structure.producers and structure.producers[name].op_type in _PASSED_ON:
                name = structure.producers[name].input[0]
            if name in structure.constants:
                kind = structure.constants[name].data_type
                counts[_NAMES.get(kind, TensorProto.DataType.Name(kind).lower())] += 1
    return dict(sorted(counts.items()))


def observed_precision(counts: dict[str, int], heads: int) -> str:
    """The precision of all multiplications by weights but the heads'; 'mixed' where they do not agree.

    Args:
        counts: ``multiplications`` of a graph.
        heads: how many linear layers stay fp32 in every precision.
    """
    lower = [name for name in counts if name != "fp32"]
    if not lower:
        return "fp32"
    return lower[0] if len(lower) == 1 and counts.get("fp32", 0) <= heads else "mixed"


def precision_entries(
    graphs: Mapping[str, Path], precision: str, heads: Mapping[str, int], notes: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """What the manifest says of each graph: precision requested and observed, multiplications counted, a note.

    Args:
        heads: linear layers of each step's head.
        notes: why a graph is not of the requested precision.
    """
    heads = {**heads, "single": sum(heads.values())}
    entries = {}
    for role, path in graphs.items():
        counts = multiplications(onnx.load(path))
        entries[role] = {
            "precision": precision,
            "observed": observed_precision(counts, heads[role]),
            "multiplications": counts,
            **({"note": notes[role]} if role in notes else {}),
        }
    return entries
