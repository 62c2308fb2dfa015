"""fp16 and bf16: which nodes compute in half precision, and the casts between them and the rest.

A node computes in half precision only if it is on a list of what is known to bear it. Statistics of layer norms are
float32 by the operator's definition (``stash_type``), a softmax that stands alone is an island of float32 together with
the addition of its mask. Fused attention takes a mask in half precision, and so does what engines are built from: their
builders put attention together themselves, sum in float32 inside, and fail where casts stand between its parts. There
the mask's constant, the lowest float32, becomes -10000: it would turn into -inf and, in a masked row, into NaN.
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
    structure, floats, (kind, numbers) = Structure(model), float_tensors(model), _TYPES[precision]
    low = _low_nodes(model, precision, guarded, floats, for_engine)
    half = floats & {name for node in model.graph.node if node.name in low for name in node.output}
    nodes: dict[str, onnx.NodeProto] = {}
    constants: dict[str, onnx.TensorProto] = {}

    def cast(name: str, new: str, to: int) -> str:
        nodes.setdefault(f"Cast/{new}", make_node("Cast", [name], new, f"Cast/{new}", to=to))
        return new

    def rounded(name: str, new: str) -> str:
        return cast(cast(name, f"{new}/rounded", kind), new, TensorProto.FLOAT)

    def read(name: str, node: onnx.NodeProto) -> str:
        """What a node reads in place of a float32 tensor."""
        new = f"{name}/{np.dtype(numbers).name}"
        if name in structure.constants and node.name in low:
            values = _in_half(structure.values(name), precision, name, node)
            constants[new] = numpy_helper.from_array(values.astype(np.float32) if emulated else values, new)
            return new
        if name in structure.constants or (name in half) == (node.name in low):
            return name
        if node.name in low:
            return rounded(name, new) if emulated else cast(name, new, kind)
        return name if emulated else cast(name, f"{name}/float32", TensorProto.FLOAT)

    for node in model.graph.node:
        changed = deepcopy(node)
        changed.input[:] = [read(name, node) if name in floats else name for name in node.input]
        nodes[node.name] = changed
        if emulated and node.name in low:
            changed.output[:] = [f"{name}/unrounded" if name in floats else name for name in node.output]
            for name in floats & set(node.output):
                rounded(f"{name}/unrounded", name)
    return replace_nodes(deepcopy(model), nodes.values(), constants.values())


def _in_half(values: np.ndarray, precision: str, name: str, reader: onnx.NodeProto) -> np.ndarray:
    """A constant in half precision; the lowest float32 becomes ``MASKED``."""
    numbers = _TYPES[precision][1]
    largest, limit = float(np.max(np.abs(values), initial=0)), float(ml_dtypes.finfo(numbers).max)
    if values.size == 1 and values.item() <= -3e38:
        return np.full_like(values, MASKED, numbers)
    if largest > limit:
        raise ExportError(
            f"'{name}' holds {largest:.6g}, {precision} ends at {limit:.6g} (read by {reader.name}); fix: "
            f"--precision {'bf16' if precision == 'fp16' else 'fp32'} or fp32"
        )
    return values.astype(numbers)


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
    structure, following, high = Structure(model), _FOLLOWING, guarded
    if for_engine:
        following = _FOLLOWING | {"Softmax", "IsNaN"}
    else:  # each softmax and what adds the mask right before it
        alone = [node for node in model.graph.node if node.op_type == "Softmax"]
        before = [structure.producers.get(node.input[0]) for node in alone]
        masking = [node for node in before if node is not None and node.op_type in ("Add", "Where")]
        high = guarded | {node.name for node in (*alone, *masking)}
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
