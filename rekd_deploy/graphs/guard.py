"""Graphs that a backend of Triton's runs by itself, with nothing of ours before them: guarded against values.

ONNX Runtime takes a negative id for one counted from the end, and fails the whole batch for one that is too large;
TensorRT reads zeros without a word (NVIDIA/TensorRT issue 4774). In a guarded graph a row with an id, a mask or a
position that cannot be, or more tokens than the model was made for, has NaN for scores, logits and probabilities and an
empty rationale. The outputs of all other rows stay what they were, bit for bit. torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from rekd_deploy.contract.signature import GraphSignature, TensorSpec
from rekd_deploy.graphs.onnx_model import make_node, replace_nodes

_PREFIX = "guard/"


def guarded(model: onnx.ModelProto, signature: GraphSignature, vocabulary: int, features: int) -> onnx.ModelProto:
    """A copy of a graph that gives NaN in every row with a value it cannot read.

    Args:
        vocabulary: ids lie in 0..vocabulary - 1; 0 for images.
        features: the most tokens of a text, or the patches of an image.
    """
    guard = _Guard()
    inputs = {spec.name for spec in signature.inputs}
    checks = []
    if "input_ids" in inputs:
        checks.append(guard.outside("input_ids", guard.constant("limit", vocabulary)))
        width = guard.node("Cast", [guard.columns("input_ids")], "input_ids/length", to=TensorProto.INT32)
        longest = guard.node("Cast", [guard.constant("longest", features)], "longest/length", to=TensorProto.INT32)
        checks.append(guard.node("Greater", [width, longest], "input_ids/long"))
    if "attention_mask" in inputs:
        checks.append(guard.outside("attention_mask", guard.constant("two", 2)))
        most = guard.node("ReduceMax", ["attention_mask", guard.constant("axis", [1])], "most", keepdims=1)
        checks.append(guard.node("Less", [most, guard.constant("one", 1)], "empty"))
    if "positions" in inputs:
        limit = guard.columns("input_ids") if "input_ids" in inputs else guard.constant("patches", features)
        checks.append(guard.outside("positions", limit))
    changed = deepcopy(model)
    if not checks:
        return changed
    bad, *others = checks
    for index, check in enumerate(others):
        bad = guard.node("Or", [bad, check], f"bad/{index}")
    raw = {spec.name: f"{_PREFIX}{spec.name}/raw" for spec in signature.outputs if spec.name not in ("kept", "keep")}
    after = []
    for name in raw:
        if name == "mask":
            read = [raw[name], guard.node("Not", [bad], "fine")]
        elif name == "positions":  # so that the next step knows, too
            read = [bad, guard.constant("minus", -1), raw[name]]
        else:
            zero = guard.constant("nought", 0.0)  # NaN as a constant would look like a damaged weight
            read = [bad, guard.node("Div", [zero, zero], "nan"), raw[name]]
        after.append(make_node("And" if name == "mask" else "Where", read, name, _PREFIX + name))
    for node in changed.graph.node:
        node.input[:] = [guard.readable.get(name, name) for name in node.input]
    _rename(changed.graph.node, raw)
    return replace_nodes(changed, [*guard.nodes.values(), *changed.graph.node, *after], guard.constants.values())


class _Guard:
    """What goes before a graph's own nodes. Names of nodes and constants are given without their prefix."""

    def __init__(self) -> None:
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.readable: dict[str, str] = {}
        """By input: the tensor that the graph's own nodes read instead."""

    def constant(self, name: str, value: int | list[int] | float) -> str:
        kind = np.float32 if isinstance(value, float) else np.int64
        self.constants.setdefault(name, numpy_helper.from_array(np.array(value, kind), _PREFIX + name))
        return _PREFIX + name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.setdefault(name, make_node(operator, inputs, _PREFIX + name, **attributes))
        return _PREFIX + name

    def outside(self, name: str, limit: str) -> str:
        """Rows of an input (B, .) with a value outside 0..limit - 1: (B, 1) bool; the graph sees the nearest inside."""
        zero, one = self.constant("zero", 0), self.constant("one", 1)
        low = self.node("Less", [name, zero], f"{name}/low")
        high = self.node("GreaterOrEqual", [name, limit], f"{name}/high")
        wrong = self.node("Or", [low, high], f"{name}/wrong")
        numbers = self.node("Cast", [wrong], f"{name}/numbers", to=TensorProto.INT64)
        count = self.node("ReduceMax", [numbers, self.constant("axis", [1])], f"{name}/count", keepdims=1)
        last = self.node("Sub", [limit, one], f"{limit.removeprefix(_PREFIX)}/last")
        floor = self.node("Max", [name, zero], f"{name}/floor")
        self.readable[name] = self.node("Min", [floor, last], f"{name}/readable")
        return self.node("Greater", [count, zero], f"{name}/bad")

    def columns(self, name: str) -> str:
        """The size of the second axis, (1,); counted where the values lie: a GPU would be handed it by the host."""
        zero, one, ends = self.constant("zero", 0), self.constant("one", 1), self.constant("ends", [-1])
        shape = self.node("Shape", [name], f"{name}/columns", start=1, end=2)
        width = self.node("Squeeze", [shape], f"{name}/width")
        numbers = self.node("Range", [zero, width, one], f"{name}/places")
        last = self.node("Gather", [numbers, ends], f"{name}/end")
        return self.node("Add", [last, one], f"{name}/size")


def decision_graph(
    model: onnx.ModelProto, inputs: Sequence[TensorSpec], decided: Sequence[TensorSpec]
) -> onnx.ModelProto:
    """The part of an exported graph between its scores and its mask: (scores, inputs) -> what was decided.

    It lets a test feed the very decision that is served with scores of its choice, ties above all.
    """
    from onnx.utils import Extractor

    changed = deepcopy(model)
    nodes = changed.graph.node
    raw = next((node.input[2] for node in nodes if node.name.endswith(f"{_PREFIX}scores")), None)
    if raw is not None:  # the decision of a guarded graph reads the scores before they are replaced
        kept = [node for node in nodes if "scores" not in node.output]
        _rename(kept, {raw: "scores"})
        replace_nodes(changed, kept)
    read = ["scores", *(spec.name for spec in inputs)]
    return Extractor(changed).extract_model(read, [spec.name for spec in decided])


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    for node in nodes:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
