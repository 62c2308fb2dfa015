"""Fused graphs for ONNX Runtime's CPU kernels, where one of the fusions costs more than it saves. torch-free.

SkipLayerNormalization is not vectorised on CPUs: five to fifteen times the time of a sum and a LayerNormalization,
a fifth to two thirds of a small network's time. On GPUs it is the faster form, and stays.
The sum is written as Sum, not as Add, since ONNX Runtime would fuse an Add again at load time.
"""

from __future__ import annotations

import onnx
from onnx import helper

from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN

_EPSILON = 1e-5
"""The operators' default."""


def norms_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every SkipLayerNormalization is a Sum and a LayerNormalization; it computes the same."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        statistics = {name for name in node.output[1:3] if name in read}
        if node.op_type != "SkipLayerNormalization" or node.domain != RUNTIME_DOMAIN or statistics:
            nodes.append(node)
            continue
        first, skip, *rest = node.input
        scale, shift, bias = [*rest, "", ""][:3]
        attributes = {attribute.name: attribute.f for attribute in node.attribute}
        total = node.output[3] if len(node.output) > 3 and node.output[3] else f"{node.output[0]}/sum"
        name = node.name or node.output[0]
        nodes += [
            helper.make_node("Sum", [first, skip, bias] if bias else [first, skip], [total], name=f"{name}/sum"),
            helper.make_node(
                "LayerNormalization", [total, scale, shift] if shift else [total, scale], [node.output[0]], name=name,
                axis=-1, epsilon=attributes.get("epsilon", _EPSILON),
            ),
        ]
    changed.graph.ClearField("node")
    changed.graph.node.extend(nodes)
    return changed
