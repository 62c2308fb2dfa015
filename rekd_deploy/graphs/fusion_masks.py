"""Fused graphs for ONNX Runtime's CPU kernels: which keys are visible, told by a mask of keys. torch-free.

The fusions hand attention its mask as a term (B, 1, N, N) that is added to the products of queries and keys. ONNX
Runtime 1.19 (Triton 24.10) loads such a graph and fails at the first request, for it wants that term for each head. All
versions take the mask of keys (B, N) that the term was made from, which also saves making it.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN

_MASK_INPUTS = {"Attention": (3, 5), "MultiHeadAttention": (4, 5)}
"""By operator: the input that takes a mask of keys, and the one that takes the term."""
_INVISIBLE = -1e4
"""A term of at most that hides a key: exp of it is 0."""


def masked_by_keys(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which attention is told which keys are visible; a term that is no mask of keys stays as it is."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    origins = _Origins(changed.graph)
    nodes: list[onnx.NodeProto] = []
    made: set[str] = set()
    for node in changed.graph.node:
        nodes.append(node)
        if not has_added_mask(node):
            continue
        place, term = _MASK_INPUTS[node.op_type]
        keys = origins.keys(node.input[term])
        if keys is None or node.input[place] or any(node.input[term + 1 :]):
            continue
        mask = f"{keys}/visible"
        if mask not in made:
            made.add(mask)
            nodes.insert(
                len(nodes) - 1, helper.make_node("Cast", [keys], [mask], name=mask, to=TensorProto.INT32)
            )
        node.input[:] = [*node.input[:place], mask]
    changed.graph.ClearField("node")
    changed.graph.node.extend(nodes)
    return without_unread(changed)


def has_added_mask(node: onnx.NodeProto) -> bool:
    """Whether the node is a fused attention with a term that is added to its products."""
    if node.domain != RUNTIME_DOMAIN or node.op_type not in _MASK_INPUTS:
        return False
    term = _MASK_INPUTS[node.op_type][1]
    return len(node.input) > term and bool(node.input[term])


def without_unread(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without nodes and constants that no output depends on."""
    needed = {value.name for value in model.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    for field, entries in (
        ("node", kept[::-1]), ("initializer", [one for one in model.graph.initializer if one.name in needed]),
    ):
        entries = list(entries)
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(entries)
    return model


class _Origins:
    """Where the tensors of a graph come from."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output if name}

    def keys(self, name: str) -> str | None:
        """The mask (B, N) that a term or condition (B, 1, .., N) repeats for every query; None: another thing."""
        node = self._producers.get(name)
        match node.op_type if node is not None else "":
            case "Where" if self._hides(node):
                return self.keys(node.input[0])
            case "Expand":
                return self.keys(node.input[0])
            case "And":  # with what depends on sizes alone, and is always true
                told = [side for side in node.input if self._depends_on_values(side)]
                return self.keys(told[0]) if len(told) == 1 else None
            case "GatherND" | "Unsqueeze":
                return node.input[0]
        return None

    def _hides(self, node: onnx.NodeProto) -> bool:
        """Whether a Where gives 0 for true and a hiding term for false."""
        if any(name not in self._constants for name in node.input[1:]):
            return False
        visible, hidden = (numpy_helper.to_array(self._constants[name]) for name in node.input[1:])
        return bool(np.all(visible == 0) and np.all(hidden <= _INVISIBLE))

    def _depends_on_values(self, name: str) -> bool:
        """Whether more than the sizes of the graph's inputs decide a tensor."""
        if not name or name in self._constants:
            return False
        node = self._producers.get(name)
        if node is None:
            return True
        return node.op_type != "Shape" and any(self._depends_on_values(source) for source in node.input)
