"""What every conversion needs of a graph: names, types, the nodes that stay float32, and attention taken apart."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN, Structure, replace_nodes
from rekd_deploy.runtimes.onnxruntime import onnx_runtime, quiet_session

_ATTENTION_SETTINGS = {"num_heads", "qkv_hidden_sizes", "scale", "unidirectional"}


def name_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes all have names of their own: the first output's where one is missing or taken.

    Raises:
        ExportError: a node holds a graph of its own.
    """
    named = deepcopy(model)
    taken: set[str] = set()
    for node in named.graph.node:
        if not node.name or node.name in taken:
            node.name = f"node/{next(name for name in node.output if name)}"
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ExportError(f"the node {node.name} holds a graph of its own; only fp32 is served")
        taken.add(node.name)
    return named


def is_linear(node: onnx.NodeProto, structure: Structure) -> bool:
    """Whether the node multiplies by a weight."""
    return node.op_type in ("MatMul", "Gemm") and node.input[1] in structure.constants


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors, as ONNX Runtime infers them; ONNX does not know the fused operators' types.

    Raises:
        ExportError: ONNX Runtime cannot load the graph.
    """
    structure, unoptimised = Structure(model), onnx_runtime().GraphOptimizationLevel.ORT_DISABLE_ALL
    probe = deepcopy(model)
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in structure.producers if name not in structure.outputs
    )
    try:
        session = quiet_session(probe.SerializeToString(), graph_optimization_level=unoptimised)
    except Exception as error:  # the library's exceptions share no root
        raise ExportError(f"the types of the graph cannot be inferred: {str(error).splitlines()[0]}") from None
    values = (*session.get_inputs(), *session.get_outputs())
    typed = {value.name for value in values if value.type == "tensor(float)"}
    return typed | {name for name, tensor in structure.constants.items() if tensor.data_type == onnx.TensorProto.FLOAT}


def guarded_nodes(model: onnx.ModelProto, output: str, linears: int) -> set[str]:
    """Names of the nodes that stay float32: the head that makes ``output``, and all that follows from it.

    Args:
        output: 'scores' or 'logits'.
        linears: how many linear layers the head has.

    Raises:
        ExportError: the graph has no such head.
    """
    structure, head = Structure(model), set()

    def walk_back(tensor: str, left: int) -> bool:
        """Whether the head's first layer lies before the tensor."""
        node = structure.producers.get(tensor)
        if node is None:
            return False
        head.add(node.name)
        if is_linear(node, structure) and (left := left - 1) == 0:
            return True
        return any([walk_back(name, left) for name in node.input if name not in structure.constants])

    if not walk_back(output, linears):
        raise ExportError(f"no head with {linears} linear layers leads to '{output}'; fix: export as fp32")
    return head | {node.name for node in following(model, [output])}


def following(model: onnx.ModelProto, tensors: Iterable[str]) -> list[onnx.NodeProto]:
    """Every node that depends on one of the tensors, in order."""
    reached = set(tensors)
    found = []
    for node in model.graph.node:
        if reached & set(node.input):
            reached |= set(node.output)
            found.append(node)
    return found


def split_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every Attention is three MatMuls and a MultiHeadAttention; it computes the same.

    Attention holds the projection of queries, keys and values in itself and has no int8 form that takes all of its
    masks. Weights that are joined by the graph stay apart; joined ones are taken apart.
    """
    split = deepcopy(model)
    structure = Structure(split)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in split.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type != "Attention" or node.domain != RUNTIME_DOMAIN or not _can_be_split(node, attributes):
            nodes.append(node)
            continue
        source, joined, bias = node.input[:3]
        keys, _, term = [*node.input[3:], "", "", ""][:3]
        parts = [f"{node.output[0]}/{letter}" for letter in "qkv"]
        weights = _projections(joined, attributes.get("qkv_hidden_sizes"), structure, constants)
        nodes += [
            helper.make_node("MatMul", [source, weight], [part], name=f"{node.name}/{letter}")
            for letter, weight, part in zip("qkv", weights, parts, strict=True)
        ]
        inputs = [*parts, bias, keys, term]
        while not inputs[-1]:
            inputs.pop()
        options = {key: attributes[key] for key in ("num_heads", "scale") if key in attributes}
        nodes.append(
            helper.make_node(
                "MultiHeadAttention", inputs, [node.output[0]], name=node.name, domain=RUNTIME_DOMAIN, **options
            )
        )
    read = {name for node in nodes for name in node.input} | structure.outputs
    nodes = [node for node in nodes if read & set(node.output)]  # what joined the weights is read no more
    return replace_nodes(split, nodes, [*split.graph.initializer, *constants])


def _can_be_split(node: onnx.NodeProto, attributes: dict) -> bool:
    others = any(node.input[4:5]) or any(node.input[6:])
    return (
        set(attributes) <= _ATTENTION_SETTINGS and not attributes.get("unidirectional") and not others
        and bool(node.input[2]) and len(node.output) == 1
    )


def _projections(
    joined: str, sizes: list[int] | None, structure: Structure, constants: list[onnx.TensorProto]
) -> list[str]:
    """Names of the three projections' weights (H, H); those that are made here are added to ``constants``."""
    producer = structure.producers.get(joined)
    if producer is not None and producer.op_type == "Concat" and len(producer.input) == 3:
        return list(producer.input)
    parts = np.split(numpy_helper.to_array(structure.constants[joined]), np.cumsum(sizes[:2]) if sizes else 3, axis=1)
    names = [f"{joined}/{letter}" for letter in "qkv"]
    constants += [
        numpy_helper.from_array(np.ascontiguousarray(part), name) for name, part in zip(names, parts, strict=True)
    ]
    return names
