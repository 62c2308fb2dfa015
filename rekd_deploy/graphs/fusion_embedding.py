"""Fused graphs for ONNX Runtime: the look-ups of words, positions and types, their sum and its norm as one operator.

onnxscript's fusions leave them apart. Done after a conversion to another precision, and only where the tables are still
float32: what the operator does in half precision is another matter. torch-free.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import TensorProto, helper

from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN
from rekd_deploy.graphs.precision.structure import Structure

_SUMS = ("Add", "Sum")
_NORMS = {"LayerNormalization": 1, "SkipLayerNormalization": 2}
"""How many of the first inputs are summands."""
_EPSILON = {"LayerNormalization": 1e-5, "SkipLayerNormalization": 1e-12}
"""The operators' defaults."""


def embeddings_together(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the embeddings of a BERT are one EmbedLayerNormalization; other graphs stay as they are."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    structure = Structure(changed)
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        found = _lookups(node, structure)
        nodes += _embedding(node, found) if found else [node]
    kept = _needed(nodes, structure.outputs)
    if len(kept) < len(changed.graph.node):
        changed.graph.ClearField("node")
        changed.graph.node.extend(kept)
    return changed


def _lookups(norm: onnx.NodeProto, structure: Structure) -> list[onnx.NodeProto] | None:
    """The look-ups of words, positions and types whose sum is normalised; None where it is another sum."""
    summands = _NORMS.get(norm.op_type, 0)
    parameters = norm.input[summands : summands + 2]
    if not summands or len(parameters) < 2 or not all(name in structure.constants for name in parameters):
        return None
    if any(norm.input[summands + 2 :]) or any(name in structure.readers for name in norm.output[1:]):
        return None
    found = [leaf for name in norm.input[:summands] for leaf in _leaves(name, structure)]
    if len(found) != 3 or not all(leaf is not None and _is_lookup(leaf, structure) for leaf in found):
        return None
    types, positions, words = sorted(found, key=lambda leaf: structure.constants[leaf.input[0]].dims[0])
    return [words, positions, types]


def _leaves(name: str, structure: Structure) -> list[onnx.NodeProto | None]:
    """The nodes whose results a sum is made of; None for what no node makes."""
    node = structure.producers.get(name)
    if node is not None and node.op_type in _SUMS and len(structure.readers[name]) == 1:
        return [leaf for source in node.input for leaf in _leaves(source, structure)]
    return [node]


def _is_lookup(node: onnx.NodeProto, structure: Structure) -> bool:
    table = structure.constants.get(node.input[0]) if node.op_type == "Gather" else None
    along = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return table is not None and table.data_type == TensorProto.FLOAT and len(table.dims) == 2 and along == 0


def _embedding(norm: onnx.NodeProto, lookups: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The operator, and the casts to the type of indices that it takes."""
    name = norm.name or norm.output[0]
    tables = [lookup.input[0] for lookup in lookups]
    indices = [f"{name}/{what}" for what in ("words", "positions", "types")]
    casts = [
        helper.make_node("Cast", [lookup.input[1]], [index], name=index, to=TensorProto.INT32)
        for lookup, index in zip(lookups, indices, strict=True)
    ]
    epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), _EPSILON[norm.op_type])
    scale, shift = norm.input[_NORMS[norm.op_type] :][:2]
    inputs = [indices[0], indices[2], *tables, scale, shift, "", indices[1]]
    return [
        *casts,
        helper.make_node(
            "EmbedLayerNormalization", inputs, [norm.output[0], ""], name=name, domain=RUNTIME_DOMAIN, epsilon=epsilon
        ),
    ]


def _needed(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Those that something still reads."""
    readers = Counter(name for node in nodes for name in set(node.input))
    kept = []
    for node in reversed(nodes):
        if any(readers[name] or name in outputs for name in node.output if name):
            kept.append(node)
        else:
            readers.subtract(set(node.input))
    return kept[::-1]
