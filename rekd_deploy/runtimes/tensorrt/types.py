"""Which number types a graph has and an engine computes in. torch-free; onnx is loaded where it is needed.

TensorRT 11 has no precision flags: an engine computes in the types of the graph. A graph that was never converted
builds without a word into an engine of the wrong precision, so both ends are counted: the typed graph before the
build, and the engine's own report wherever it can be loaded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rekd_deploy.errors import EngineError

NOT_AVAILABLE = "not available"
"""What stands for an engine's precision until it has been loaded on a GPU."""

_IN_REPORT = {
    "fp16": r"half|fp16", "bf16": r"bf16|bfloat16", "fp32": r"float|fp32|float32", "int8": r"int8", "fp8": r"fp8",
    "fp4": r"fp4", "int4": r"int4", "int32": r"int32", "int64": r"int64", "bool": r"bool", "uint8": r"uint8",
}
"""Words of the inspector: "Half", "Row major linear FP16 format", ..."""
_WORDS = {
    name: re.compile(rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])", re.IGNORECASE) for name, words in _IN_REPORT.items()
}
_TYPE_KEYS = ("Datatype", "DataType", "Format/Datatype")
"""Where the inspector tells a tensor's type: TensorRT 11 and RTX, their lists of inputs and outputs, TensorRT 10."""
_FUSED = "ForeignNode"
"""In the name of a layer that is a compiled part of the graph: its inputs and outputs say nothing of its inside."""
_IN_ONNX = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
_DOMAINS = ("", "ai.onnx")
_COMPUTED = {"fp32", "fp16", "bf16", "int8", "fp8", "fp4", "int4"}
"""Types that numbers are computed in; the others count, choose and mask."""


def graph_types(graph: Path, precision: str) -> dict[str, int]:
    """How many tensors of each type an ONNX graph holds, weights and results of operators.

    Raises:
        EngineError: the graph is made of ONNX Runtime's own operators, cannot be read, or would not build into an
            engine of the precision.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(graph)))
    except (OSError, DecodeError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"{graph.name} is not an ONNX graph: {_line(error)}; fix: export it again") from None
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in _DOMAINS})
    if foreign:
        raise EngineError(
            f"{graph.name} holds operators of another runtime ({', '.join(foreign[:3])}); fix: export it unfused "
            "(--no-fuse)"
        )
    kinds = [weight.data_type for weight in model.graph.initializer]
    kinds += [value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)]
    names = (onnx.TensorProto.DataType.Name(kind) for kind in kinds if kind)
    types = dict(sorted(Counter(_IN_ONNX.get(name, name.lower()) for name in names).items()))
    _check(types, precision, f"the graph of {graph.name}")
    return types


def report_types(report: str) -> dict[str, int]:
    """How many inputs and outputs of layers have each type, by an engine inspector's report.

    Args:
        report: ``get_engine_information`` in JSON.

    Returns:
        Counts by type, 'unknown' among them for words that are not understood and for the inside of each part that was
        compiled as one layer; empty where the report does not tell (an engine built without details).

    Raises:
        EngineError: the report is not JSON.
    """
    try:
        layers = json.loads(report).get("Layers", [])
    except (json.JSONDecodeError, AttributeError) as error:
        raise EngineError(f"the engine's report cannot be read: {_line(error)}") from None
    words = Counter(_word(text) for layer in layers if isinstance(layer, dict) for text in _formats(layer))
    return dict(sorted(words.items()))


def _formats(layer: Mapping[str, Any]) -> Iterator[str]:
    if _FUSED in str(layer.get("Name")):
        yield "not told"
    for kind in ("Inputs", "Outputs"):
        for tensor in layer.get(kind, []):
            yield from [str(tensor[key]) for key in _TYPE_KEYS if isinstance(tensor, dict) and key in tensor][:1]


def _word(text: str) -> str:
    found = [name for name, word in _WORDS.items() if word.search(text)]
    return found[0] if len(found) == 1 else "unknown"


def observed_precision(types: Mapping[str, int], precision: str, name: str) -> str:
    """The precision that an engine of these types computes in.

    Returns:
        ``precision``, or 'not available' where the report does not show it: no type that numbers are computed in is
        known, or some types are unknown and the others, as the fp32 that an engine of any precision takes and gives,
        do not decide.

    Raises:
        EngineError: it is not the requested precision.
    """
    computed = _COMPUTED & set(types)
    decides = precision != "fp32" and precision in computed
    if not computed or ("unknown" in types and not decides and not computed - _allowed(precision)):
        return NOT_AVAILABLE
    _check(types, precision, f"the engine of {name}")
    return precision


def _allowed(precision: str) -> set[str]:
    """fp32 means nothing else; any other means some of it, and beside it fp32 (int8 also half precision)."""
    return {precision, "fp32"} | ({"fp16", "bf16"} if precision == "int8" else set())


def _check(types: Mapping[str, int], precision: str, what: str) -> None:
    computed = {kind for kind in types if kind in _COMPUTED}
    if precision not in computed or computed - _allowed(precision):
        found = ", ".join(f"{count} of {kind}" for kind, count in types.items() if kind in _COMPUTED) or "none"
        raise EngineError(
            f"{what} was to compute in {precision}; its tensors: {found}; fix: export again with "
            f"--precision {precision}"
        )


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
