"""Slots that follow the padded length: short texts hand few of them to the predictor. torch-free.

The selector is traced with the slots of the longest text; here its hand-over is cut to those that a text of the length
at hand can fill. The number is computed from the shape of an input, so it is a constant wherever shapes are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rekd_deploy.contract.signature import MILLION, SLOTS, GraphSignature

if TYPE_CHECKING:
    import onnx_ir

_CUT = "slots/"
"""What the names of the added tensors begin with."""


def cut_to_length(model: onnx.ModelProto, signature: GraphSignature) -> onnx.ModelProto:
    """A copy of a selector's graph whose outputs with the axis 'slots' are as long as ``Slots.at`` says.

    Args:
        signature: the selector's, with a rule of slots.
    """
    rule, names = signature.slots, [spec.name for spec in signature.outputs if SLOTS in spec.shape]
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [f"{_CUT}all_{name}" if name in names else name for name in tensors]
    constants = {
        "share": [rule.parts_per_million], "million": [MILLION], "least": [rule.least], "most": [rule.most],
        "start": [0], "axis": [1],
    }
    changed.graph.initializer.extend(
        numpy_helper.from_array(np.array(values, np.int64), _CUT + name) for name, values in constants.items()
    )
    # integers throughout: ONNX divides them towards 0, which is down here
    changed.graph.node.extend([
        _node("Shape", [signature.inputs[0].name], "length", start=1, end=2),
        _node("Mul", [f"{_CUT}length", f"{_CUT}share"], "parts"),
        _node("Div", [f"{_CUT}parts", f"{_CUT}million"], "whole"),
        _node("Max", [f"{_CUT}whole", f"{_CUT}least"], "wanted"),
        _node("Min", [f"{_CUT}wanted", f"{_CUT}most"], "count"),
        *(
            helper.make_node(
                "Slice", [f"{_CUT}all_{name}", f"{_CUT}start", f"{_CUT}count", f"{_CUT}axis"], [name],
                name=f"{_CUT}{name}",
            )
            for name in names
        ),
    ])
    for value in changed.graph.output:
        if value.name in names:
            value.type.tensor_type.shape.dim[1].dim_param = SLOTS
    return changed


def _node(operator: str, inputs: list[str], result: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [_CUT + result], name=_CUT + result, **attributes)


def sizes_from_tensors(model: onnx_ir.Model) -> None:
    """Read a size that the exporter computes, as 1 + slots, from a tensor that has it; changes ``model``.

    ONNX Runtime's fusion of attention knows only shapes whose sizes come straight from a tensor.
    """
    import onnx_ir

    for node in list(model.graph):
        if node.op_type != "Add" or not _is_number(node.outputs[0]):
            continue
        single = [reader for reader in node.outputs[0].consumers() if reader.op_type == "Reshape"]
        source = _with_axis(model, f"{SLOTS} + 1")
        if not single or source is None:
            continue
        tensor, axis = source
        attributes = [onnx_ir.AttrInt64("start", axis), onnx_ir.AttrInt64("end", axis + 1)]
        shape = onnx_ir.Node("", "Shape", [tensor], attributes, num_outputs=1, name=f"{_CUT}size")
        size = shape.outputs[0]
        size.name, size.dtype, size.shape = f"{_CUT}size", onnx_ir.DataType.INT64, onnx_ir.Shape([1])
        model.graph.insert_after(tensor.producer(), shape)
        for reader in single:
            reader.outputs[0].replace_all_uses_with(size)
        return


def _is_number(value: onnx_ir.Value) -> bool:
    return value.shape is not None and value.shape.rank() == 0


def _with_axis(model: onnx_ir.Model, axis: str) -> tuple[onnx_ir.Value, int] | None:
    """The first tensor of integers with that axis, and which axis it is."""
    for node in model.graph:
        for value in node.outputs:
            sizes = [] if value.shape is None else [str(size) for size in value.shape]
            if axis in sizes:
                return value, sizes.index(axis)
    return None
