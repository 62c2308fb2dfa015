"""Fused attention taken into its projections and the attention proper, so that the projections can be int8."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN
from rekd_deploy.graphs.precision.structure import Structure


def split_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every Attention is three MatMuls and a MultiHeadAttention; it computes the same.

    Attention holds the projection of queries, keys and values in itself and has no int8 form that takes all of its
    masks. Weights that are joined by the graph stay apart; joined ones are taken apart.
    """
    split = onnx.ModelProto()
    split.CopyFrom(model)
    structure = Structure(split)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in split.graph.node:
        if node.op_type != "Attention" or node.domain != RUNTIME_DOMAIN or not _can_be_split(node):
            nodes.append(node)
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        source, _, bias = node.input[:3]
        keys, _, term = [*node.input[3:], "", "", ""][:3]
        parts = []
        for letter, weight in zip("qkv", _weights(node, structure, constants), strict=True):
            parts.append(f"{node.output[0]}/{letter}")
            nodes.append(helper.make_node("MatMul", [source, weight], [parts[-1]], name=f"{node.name}/{letter}"))
        options = {key: attributes[key] for key in ("num_heads", "scale") if key in attributes}
        nodes.append(
            helper.make_node(
                "MultiHeadAttention", _trimmed([*parts, bias, keys, term]), [node.output[0]],
                name=node.name, domain=RUNTIME_DOMAIN, **options,
            )
        )
    split.graph.ClearField("node")
    split.graph.node.extend(nodes)
    split.graph.initializer.extend(constants)
    used = {name for node in nodes for name in node.input}
    return _without_unused(split, used)


def _can_be_split(node: onnx.NodeProto) -> bool:
    known = {"num_heads", "qkv_hidden_sizes", "scale", "unidirectional"}
    attributes = {attribute.name: attribute for attribute in node.attribute}
    causal = "unidirectional" in attributes and attributes["unidirectional"].i
    others = any(node.input[4:5]) or any(node.input[6:])
    return set(attributes) <= known and not causal and not others and bool(node.input[2]) and len(node.output) == 1


def _trimmed(inputs: list[str]) -> list[str]:
    """Without the empty names at the end."""
    while not inputs[-1]:
        inputs.pop()
    return inputs


def _weights(node: onnx.NodeProto, structure: Structure, constants: list[onnx.TensorProto]) -> list[str]:
    """Names of the three projections' weights (H, H)."""
    joined = node.input[1]
    producer = structure.producers.get(joined)
    if producer is not None and producer.op_type == "Concat" and len(producer.input) == 3:
        return list(producer.input)
    sizes = next((list(entry.ints) for entry in node.attribute if entry.name == "qkv_hidden_sizes"), None)
    values = numpy_helper.to_array(structure.constants[joined])
    cuts = np.cumsum(sizes[:2]) if sizes else 3
    names = [f"{joined}/{letter}" for letter in "qkv"]
    for name, part in zip(names, np.split(values, cuts, axis=1), strict=True):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(part), name))
    return names


def _without_unused(model: onnx.ModelProto, used: set[str]) -> onnx.ModelProto:
    """Joined weights that nothing reads any more are dropped, and what joined them."""
    outputs = {value.name for value in model.graph.output}
    nodes = [node for node in model.graph.node if used & set(node.output) or outputs & set(node.output)]
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(constants)
    return model
