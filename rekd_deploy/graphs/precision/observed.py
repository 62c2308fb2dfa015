"""Which precision a finished graph is of, counted from its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from rekd_deploy.graphs.precision.structure import Structure

_NAMES = {
    TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.INT8: "int8",
}
_WEIGHT_INPUT = {
    "MatMul": 1, "Gemm": 1, "Conv": 1, "LSTM": 1, "Attention": 1, "MatMulIntegerToFloat": 1,
}
_PASSED_ON = {"Concat", "DequantizeLinear", "Transpose", "Reshape", "Cast"}


def multiplications(model: onnx.ModelProto) -> dict[str, int]:
    """How many multiplications by weights a graph holds in each precision: {"fp16": 12, "fp32": 1}."""
    structure = Structure(model)
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in _WEIGHT_INPUT:
            name = node.input[_WEIGHT_INPUT[node.op_type]]
            while name not in structure.constants and name in structure.producers:
                producer = structure.producers[name]
                if producer.op_type not in _PASSED_ON:
                    break
                name = producer.input[0]
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
    graphs: Mapping[str, Path], asked: str, heads: Mapping[str, int], notes: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """What the manifest says of each graph: precision asked and observed, multiplications counted, a note.

    Args:
        heads: linear layers of each step's head.
        notes: why a graph is not of the precision that was asked for.
    """
    heads = {**heads, "single": sum(heads.values())}
    entries = {}
    for role, path in graphs.items():
        counts = multiplications(onnx.load(path))
        entries[role] = {
            "precision": asked,
            "observed": observed_precision(counts, heads[role]),
            "multiplications": counts,
            **({"note": notes[role]} if role in notes else {}),
        }
    return entries
