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
from onnx import TensorProto, helper, numpy_helper

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.onnx_model import Structure, replace_nodes
from rekd_deploy.graphs.precision.structure import float_tensors, name_nodes

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
_FOLLOWING_IN_ENGINES = _FOLLOWING | {"Softmax", "IsNaN"}


def to_half(
    model: onnx.ModelProto, precision: str, guarded: set[str], *, emulated: bool = False, for_engine: bool = False
) -> onnx.ModelProto:
    """The graph in 'fp16' or 'bf16'.

    Args:
        guarded: names of nodes that stay float32.
        emulated: the same roundings computed in float32, for a runtime without kernels of that type.
        for_engine: softmax in half precision, too.

    Raises:
        ExportError: a weight does not fit into the type.
    """
    return _Converter(name_nodes(model), precision, guarded, emulated, for_engine).run()


class _Converter:
    def __init__(
        self, model: onnx.ModelProto, precision: str, guarded: set[str], emulated: bool, for_engine: bool
    ) -> None:
        self._structure = Structure(model)
        self._model, self._precision, self._guarded, self._emulated = model, precision, guarded, emulated
        self._islands = set() if for_engine else self._softmax_islands()
        self._following = _FOLLOWING_IN_ENGINES if for_engine else _FOLLOWING
        self._type, self._numbers = _TYPES[precision]
        self._suffix, self._largest = np.dtype(self._numbers).name, float(ml_dtypes.finfo(self._numbers).max)
        self._floats = float_tensors(model)
        self._taken = self._floats | set(self._structure.producers) | set(self._structure.constants)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._half: set[str] = set()
        self._casts: dict[tuple[str, bool], str] = {}

    def run(self) -> onnx.ModelProto:
        low = self._low_nodes()
        self._half = {
            name for node in self._model.graph.node if node.name in low for name in node.output if name in self._floats
        }
        for node in self._model.graph.node:
            self._nodes.append(self._converted(node, node.name in low))
            if node.name in low and self._emulated:
                self._round_outputs(self._nodes[-1])
        return replace_nodes(self._model, self._nodes, [*self._model.graph.initializer, *self._constants.values()])

    # which nodes

    def _low_nodes(self) -> set[str]:
        structure, floats = self._structure, self._floats
        low: set[str] = set()
        half: set[str] = set()
        for node in self._model.graph.node:
            if node.name in self._guarded or node.name in self._islands:
                continue
            if node.op_type == "LSTM" and self._precision == "bf16":  # ONNX has none
                continue
            lookup = node.op_type == "Gather" and node.input[0] in structure.constants
            starts = (node.op_type in _STARTING or lookup) and any(name in floats for name in node.input)
            if starts or (node.op_type in self._following and half & set(node.input)):
                low.add(node.name)
                half |= {name for name in node.output if name in floats}
        return low | self._made_of_constants(low)

    def _softmax_islands(self) -> set[str]:
        """Each softmax and what adds the mask right before it."""
        islands = set()
        for node in self._model.graph.node:
            if node.op_type == "Softmax":
                islands.add(node.name)
                before = self._structure.producers.get(node.input[0])
                if before is not None and before.op_type in ("Add", "Where"):
                    islands.add(before.name)
        return islands

    def _made_of_constants(self, low: set[str]) -> set[str]:
        """Nodes whose floats are all constants and are read by half-precision nodes alone: masks, joined weights."""
        structure = self._structure
        made = {
            node.name: node
            for node in self._model.graph.node
            if node.op_type in self._following and node.name not in low | self._guarded
            and any(name in self._floats for name in node.output)
        }
        while True:
            wrong = [
                name
                for name, node in made.items()
                if any(
                    source in self._floats
                    and source not in structure.constants
                    and (source not in structure.producers or structure.producers[source].name not in made)
                    for source in node.input
                )
                or any(
                    reader.name not in made and reader.name not in low
                    for output in node.output
                    for reader in structure.readers.get(output, [])
                )
            ]
            if not wrong:
                return set(made)
            for name in wrong:
                del made[name]

    # the new graph

    def _converted(self, node: onnx.NodeProto, low: bool) -> onnx.NodeProto:
        changed = deepcopy(node)
        for index, name in enumerate(node.input):
            if name not in self._floats:
                continue
            if name in self._structure.constants:
                if low:
                    changed.input[index] = self._half_constant(name, node)
            elif (name in self._half) != low:
                changed.input[index] = self._cast(name, low)
        return changed

    def _half_constant(self, name: str, reader: onnx.NodeProto) -> str:
        values = numpy_helper.to_array(self._structure.constants[name])
        largest = float(np.max(np.abs(values), initial=0))
        if values.size == 1 and values.item() <= -3e38:
            values = np.full_like(values, MASKED)
        elif largest > self._largest:
            raise ExportError(
                f"'{name}' holds {largest:.6g}, {self._precision} ends at {self._largest:.6g} (read by "
                f"{reader.name}); fix: --precision {'bf16' if self._precision == 'fp16' else 'fp32'} or fp32"
            )
        wanted = f"{name}/{self._suffix}"
        if wanted not in self._constants:
            self._taken.add(wanted)
            rounded = values.astype(self._numbers)
            self._constants[wanted] = numpy_helper.from_array(
                rounded.astype(np.float32) if self._emulated else rounded, wanted
            )
        return wanted

    def _cast(self, name: str, down: bool) -> str:
        if (name, down) not in self._casts:
            new = self._fresh(f"{name}/{self._suffix if down else 'float32'}")
            if self._emulated:  # a half-precision tensor is a rounded one of float32 already
                self._nodes += self._rounding(name, new) if down else [_node("Identity", name, new)]
            else:
                self._nodes.append(_node("Cast", name, new, to=self._type if down else TensorProto.FLOAT))
            self._casts[name, down] = new
        return self._casts[name, down]

    def _round_outputs(self, node: onnx.NodeProto) -> None:
        for index, name in enumerate(node.output):
            if name in self._floats:
                node.output[index] = self._fresh(f"{name}/unrounded")
                self._nodes += self._rounding(node.output[index], name)

    def _rounding(self, name: str, new: str) -> list[onnx.NodeProto]:
        between = self._fresh(f"{new}/rounded")
        return [_node("Cast", name, between, to=self._type), _node("Cast", between, new, to=TensorProto.FLOAT)]

    def _fresh(self, wanted: str) -> str:
        """``wanted``, or that with a number, and noted as taken."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}.{number}"
        self._taken.add(name)
        return name


def _node(operator: str, source: str, result: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(operator, [source], [result], name=f"{operator}/{result}", **attributes)
