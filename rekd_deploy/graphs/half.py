"""fp16 and bf16: which nodes compute in half precision, and the casts between them and the rest.

A node computes in half precision only if it is on a list of what is known to bear it; whatever else there is stays
float32. Statistics of layer norms are float32 by the operator's definition (``stash_type``), a softmax
that stands alone is an island of float32 together with the addition of its mask. Fused attention takes a mask in half
precision, and so does what engines are built from: their builders put attention together themselves, sum in float32
inside, and fail where casts stand between its parts. There the mask's constant, the lowest float32, becomes -10000,
since it would turn into -inf and, where a whole row is masked, into NaN.
"""

from __future__ import annotations

from copy import deepcopy

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.onnx_model import Structure, make_node, replace_nodes
from rekd_deploy.runtimes.onnxruntime import onnx_runtime, quiet_session

MASKED = -10000.0
"""Added to the attention scores of masked positions: exp() of it is 0, and no sum with it overflows."""
_TYPES = {"fp16": (TensorProto.FLOAT16, np.float16), "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}
_STARTING = {"MatMul", "Gemm", "Conv", "LSTM", "Attention", "MultiHeadAttention"}
"""Half precision begins here, and where an embedding is looked up."""
_FOLLOWING = {
    "Add", "Sub", "Mul", "Div", "Relu", "Gelu", "BiasGelu", "FastGelu", "Tanh", "Sigmoid", "Erf",
    "LayerNormalization", "SkipLayerNormalization", "Reshape", "Transpose", "Concat", "Split", "Slice", "Gather",
    "GatherElements", "Squeeze", "Unsqueeze", "Expand", "Where", "Identity",
}
"""Half precision goes on here once one of the inputs is in it."""


def to_half(
    model: onnx.ModelProto, precision: str, guarded: set[str], *, emulated: bool = False, for_engine: bool = False
) -> onnx.ModelProto:
    """A copy of a graph, whose nodes all have names, in 'fp16' or 'bf16'.

    Args:
        guarded: names of nodes that stay float32.
        emulated: the same roundings computed in float32, for a runtime without kernels of that type.
        for_engine: softmax in half precision, too.

    Raises:
        ExportError: a weight does not fit into the type.
    """
    floats = float_tensors(model)
    low = _low_nodes(model, precision, guarded, floats, for_engine)
    converter = _Converter(model, precision, low, floats, emulated)
    return replace_nodes(deepcopy(model), converter.nodes, converter.constants.values())


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors, as ONNX Runtime infers them; ONNX does not know the fused operators' types."""
    structure = Structure(model)
    probe = deepcopy(model)
    others = (name for name in structure.producers if name not in structure.outputs)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in others)
    unoptimised = onnx_runtime().GraphOptimizationLevel.ORT_DISABLE_ALL
    session = quiet_session(probe.SerializeToString(), graph_optimization_level=unoptimised)
    values = (*session.get_inputs(), *session.get_outputs())
    typed = {value.name for value in values if value.type == "tensor(float)"}
    return typed | {name for name, tensor in structure.constants.items() if tensor.data_type == TensorProto.FLOAT}


def _low_nodes(
    model: onnx.ModelProto, precision: str, guarded: set[str], floats: set[str], for_engine: bool
) -> set[str]:
    """Names of the nodes that compute in half precision."""
    structure = Structure(model)
    following = _FOLLOWING | {"Softmax", "IsNaN"} if for_engine else _FOLLOWING
    high = guarded if for_engine else guarded | _softmax_islands(model, structure)
    low: set[str] = set()
    half: set[str] = set()
    for node in model.graph.node:
        if node.name in high or (node.op_type == "LSTM" and precision == "bf16"):  # ONNX has no such LSTM
            continue
        lookup = node.op_type == "Gather" and node.input[0] in structure.constants
        starts = (node.op_type in _STARTING or lookup) and any(name in floats for name in node.input)
        if starts or (node.op_type in following and half & set(node.input)):
            low.add(node.name)
            half |= floats & set(node.output)
    # and those that turn constants into what half-precision nodes alone read: masks, joined weights
    made = {
        node.name: node
        for node in model.graph.node
        if node.op_type in following and node.name not in low | guarded and floats & set(node.output)
    }
    found = 0
    while found != len(made):
        found = len(made)
        constant = {*structure.constants, *(name for node in made.values() for name in node.output)}
        made = {
            name: node
            for name, node in made.items()
            if floats & set(node.input) <= constant and all(
                reader.name in made or reader.name in low
                for output in node.output for reader in structure.readers.get(output, [])
            )
        }
    return low | set(made)


def _softmax_islands(model: onnx.ModelProto, structure: Structure) -> set[str]:
    """Each softmax and what adds the mask right before it."""
    alone = [node for node in model.graph.node if node.op_type == "Softmax"]
    before = (structure.producers.get(node.input[0]) for node in alone)
    masking = (node for node in before if node is not None and node.op_type in ("Add", "Where"))
    return {node.name for node in (*alone, *masking)}


class _Converter:
    """The nodes and constants of a graph whose nodes ``low`` compute in half precision."""

    def __init__(
        self, model: onnx.ModelProto, precision: str, low: set[str], floats: set[str], emulated: bool
    ) -> None:
        self._structure, self._precision, self._emulated = Structure(model), precision, emulated
        self._type, self._numbers = _TYPES[precision]
        self._suffix = np.dtype(self._numbers).name
        self._casts: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        half = {name for node in model.graph.node if node.name in low for name in node.output if name in floats}
        for node in model.graph.node:
            changed = deepcopy(node)
            for index, name in enumerate(node.input):
                if name in self._structure.constants:
                    if name in floats and node.name in low:
                        changed.input[index] = self._constant(name, node)
                elif name in floats and (name in half) != (node.name in low):
                    changed.input[index] = self._cast(name, node.name in low)
            self.nodes.append(changed)
            if emulated and node.name in low:
                for index, name in enumerate(node.output):
                    if name in floats:
                        changed.output[index] = f"{name}/unrounded"
                        self._round(f"{name}/unrounded", name)

    def _constant(self, name: str, reader: onnx.NodeProto) -> str:
        values = self._structure.values(name)
        largest, limit = float(np.max(np.abs(values), initial=0)), float(ml_dtypes.finfo(self._numbers).max)
        if values.size == 1 and values.item() <= -3e38:
            values = np.full_like(values, MASKED)
        elif largest > limit:
            raise ExportError(
                f"'{name}' holds {largest:.6g}, {self._precision} ends at {limit:.6g} (read by {reader.name}); fix: "
                f"--precision {'bf16' if self._precision == 'fp16' else 'fp32'} or fp32"
            )
        rounded = values.astype(self._numbers)
        wanted = f"{name}/{self._suffix}"
        self.constants[wanted] = numpy_helper.from_array(
            rounded.astype(np.float32) if self._emulated else rounded, wanted
        )
        return wanted

    def _cast(self, name: str, down: bool) -> str:
        if self._emulated and not down:  # what was rounded is float32 already
            return name
        new = f"{name}/{self._suffix if down else 'float32'}"
        if new not in self._casts:
            self._casts.add(new)
            if self._emulated:
                self._round(name, new)
            else:
                self._node("Cast", name, new, to=self._type if down else TensorProto.FLOAT)
        return new

    def _round(self, name: str, new: str) -> None:
        self._node("Cast", name, f"{new}/rounded", to=self._type)
        self._node("Cast", f"{new}/rounded", new, to=TensorProto.FLOAT)

    def _node(self, operator: str, source: str, result: str, **attributes: int) -> None:
        self.nodes.append(make_node(operator, [source], result, f"{operator}/{result}", **attributes))
