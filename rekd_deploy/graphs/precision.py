"""Precision as a property of the graph: from the exported fp32 graphs to fp16, bf16 and int8 ones. torch-free.

Inputs and outputs keep their types, and everything from the last layers that make ``scores`` and ``logits`` on
stays float32 in every precision: scores in half precision would tie by the dozen. No precision scales
anything by the batch, so a prediction does not depend on its neighbours or on padding.
int8 keeps a selector in float32 whose rationales it would change. Which precision a finished graph has is counted from
its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from rekd_deploy.contract.parity_report import MaskAgreement, Precision, limits_of
from rekd_deploy.contract.signature import PairSignature
from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.half import to_half
from rekd_deploy.graphs.int8 import to_int8
from rekd_deploy.graphs.onnx_model import Structure
from rekd_deploy.runtimes.base import Arrays
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_train.inputs.preprocessors import Preprocessor

_NAMES = {
    TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.INT8: "int8",
}
_MULTIPLYING = {"MatMul", "Gemm", "Conv", "LSTM", "Attention", "MatMulIntegerToFloat"}
"""Operators whose second input is a weight."""
_PASSED_ON = {"Concat", "DequantizeLinear", "Transpose", "Reshape", "Cast"}
HEAD_OUTPUTS = {"selector": "scores", "predictor": "logits"}
_CALIBRATED = 64
"""Examples that int8 is calibrated on; the gate runs on all of them."""
_BATCH_SIZE = 16


@dataclass
class Conversion:
    """The graphs of a pair in one precision, by role."""

    models: dict[str, onnx.ModelProto]
    precisions: dict[str, Precision]
    """'fp32' where a selector was kept; ``notes`` say why."""
    notes: dict[str, str] = field(default_factory=dict)
    emulated: dict[str, onnx.ModelProto] = field(default_factory=dict)
    """Graphs of the same roundings in float32, where ONNX Runtime's CPU kernels lack the precision."""


def convert_pair(
    models: dict[str, onnx.ModelProto], precision: Precision, signature: PairSignature, heads: dict[str, int],
    preprocessor: Preprocessor, items: Sequence[Any], *, fused: bool, for_engine: bool = False,
) -> Conversion:
    """Convert the exported float32 graphs, 'selector' and 'predictor', of a pair.

    Args:
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
    conversion = Conversion({}, dict.fromkeys(models, precision))
    for role, model in models.items():
        converted = to_half(model, precision, guarded[role], for_engine=for_engine)
        counts = multiplications(converted)
        if observed_precision(counts, heads[role]) != precision:
            raise ExportError(
                f"the {role} cannot be made {precision}: its multiplications would be {counts}; fix: --precision fp32"
            )
        conversion.models[role] = converted
        if precision == "bf16":
            emulated = to_half(model, precision, guarded[role], emulated=True, for_engine=for_engine)
            conversion.emulated[role] = emulated
    return conversion


def name_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes all have names of their own: the first output's where one is missing or taken."""
    named = deepcopy(model)
    taken: set[str] = set()
    for node in named.graph.node:
        if not node.name or node.name in taken:
            node.name = f"node/{next(name for name in node.output if name)}"
        taken.add(node.name)
    return named


def guarded_nodes(model: onnx.ModelProto, output: str, linears: int) -> set[str]:
    """Names of the nodes that stay float32: the head that makes 'scores' or 'logits', and all that follows from it.

    Raises:
        ExportError: the graph has no head with so many linear layers.
    """
    structure, guarded = Structure(model), set()

    def walk_back(tensor: str, left: int) -> bool:
        """Whether the head's first layer lies before the tensor."""
        node = structure.producers.get(tensor)
        if node is None:
            return False
        guarded.add(node.name)
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in structure.constants and (left := left - 1) == 0:
            return True
        return any([walk_back(name, left) for name in node.input if name not in structure.constants])

    if not walk_back(output, linears):
        raise ExportError(f"no head with {linears} linear layers leads to '{output}'; fix: export as fp32")
    reached = {output}
    for node in model.graph.node:
        if reached & set(node.input):
            reached |= set(node.output)
            guarded.add(node.name)
    return guarded


def _int8(
    models: dict[str, onnx.ModelProto], guarded: dict[str, set[str]], signature: PairSignature,
    preprocessor: Preprocessor, items: Sequence[Any], fused: bool,
) -> Conversion:
    if not items:
        raise ExportError("int8 needs examples to calibrate on; fix: --parity-texts FILE")
    conversion = Conversion({}, dict.fromkeys(models, "int8"))
    with OnnxRuntimeRunner(models["selector"].SerializeToString(), signature.selector, "the selector") as selector:
        singles = []
        for item in items[:: -(-len(items) // _CALIBRATED)]:
            inputs = without_padding(dict(preprocessor([item]).inputs))
            singles.append(inputs | selector.run(inputs))
        for role, model in models.items():
            conversion.models[role] = to_int8(model, guarded[role], singles, fused=fused)
        batches = (preprocessor(items[at : at + _BATCH_SIZE]).inputs for at in range(0, len(items), _BATCH_SIZE))
        complaints = _mask_complaints(selector, conversion.models["selector"], batches)
    if complaints:
        conversion.models["selector"], conversion.precisions["selector"] = models["selector"], "fp32"
        conversion.notes["selector"] = f"fp32, since in int8 {'; '.join(complaints)}"
    return conversion


def without_padding(inputs: Arrays) -> Arrays:
    """A batch of one text without its padding; images as they are."""
    length = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else None
    return {name: array[:, :length] for name, array in inputs.items()}


def _mask_complaints(reference: OnnxRuntimeRunner, model: onnx.ModelProto, batches: Iterable[Arrays]) -> list[str]:
    """What is wrong with the rationales of a converted selector, compared with its own."""
    agreement = MaskAgreement()
    with OnnxRuntimeRunner(model.SerializeToString(), reference.signature, "the int8 selector") as selector:
        for inputs in batches:
            ours, theirs = reference.run(inputs)["mask"], selector.run(inputs)["mask"]
            real = inputs["attention_mask"] > 0 if "attention_mask" in inputs else np.ones_like(ours)
            agreement.add(ours, theirs, real)
    return agreement.complaints(limits_of("int8"))


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


def observed_precision(counts: Mapping[str, int], heads: int) -> str:
    """The precision of all ``multiplications`` but those of the heads' linear layers; 'mixed' where they differ."""
    lower = [name for name in counts if name != "fp32"]
    if not lower:
        return "fp32"
    return lower[0] if len(lower) == 1 and counts.get("fp32", 0) <= heads else "mixed"


def precision_entries(
    graphs: Mapping[str, Path], precision: str, heads: Mapping[str, int], notes: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """What the manifest says of each graph: precision requested and observed, multiplications counted, a note."""
    heads = {**heads, "single": sum(heads.values())}
    entries = {}
    for role, path in graphs.items():
        counts = multiplications(onnx.load(path))
        observed = observed_precision(counts, heads[role])
        note = {"note": notes[role]} if role in notes else {}
        entries[role] = {"precision": precision, "observed": observed, "multiplications": counts, **note}
    return entries
