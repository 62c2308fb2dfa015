"""Graphs that a backend of Triton's runs by itself, with nothing of ours before them: guarded against values.

ONNX Runtime takes a negative id for one counted from the end, and fails the whole batch for one that is too large;
TensorRT reads zeros without a word (NVIDIA/TensorRT issue 4774). A guarded graph does none of these: a row with an id,
a mask or a position that cannot be has NaN for scores, logits and probabilities and an empty rationale; its neighbours
in the batch are served. So has every row that is longer than the texts the model was made for. The outputs of all other
rows stay what they were, bit for bit. torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rekd_deploy.contract.signature import GraphSignature, TensorSpec
from rekd_deploy.graphs.onnx_model import replace_nodes

_PREFIX = "guard/"
_RAW = "raw"
"""Stands for what the graph gave under the name of an output."""
_POISONED = ("scores", "logits", "probabilities")


def guarded(model: onnx.ModelProto, signature: GraphSignature, vocabulary: int, features: int) -> onnx.ModelProto:
    """A copy of a graph that gives NaN in every row with a value it cannot read.

    Args:
        signature: what the graph takes and gives.
        vocabulary: ids lie in 0..vocabulary - 1; 0 for images.
        features: patches of an image, which positions lie in; for texts the most tokens, whose positions lie in
            their columns.
    """
    guard = _Guard(model)
    inputs = {spec.name for spec in signature.inputs}
    checks = []
    if "input_ids" in inputs:
        checks.append(guard.within("input_ids", guard.constant("limit", vocabulary)))
        checks.append(guard.longer("input_ids", features))
    if "attention_mask" in inputs:
        checks.append(guard.within("attention_mask", guard.constant("two", 2)))
        most = guard.node("ReduceMax", ["attention_mask", guard.constant("axis", [1])], "most", keepdims=1)
        checks.append(guard.node("Less", [most, guard.constant("one", 1)], "empty"))
    if "positions" in inputs:
        limit = guard.columns("input_ids") if "input_ids" in inputs else guard.constant("patches", features)
        checks.append(guard.within("positions", limit))
    if not checks:
        return guard.model
    bad = guard.any(checks)
    for spec in signature.outputs:
        if spec.name in _POISONED:
            guard.replace_output(spec.name, "Where", [bad, guard.nothing(), _RAW])
        elif spec.name == "mask":
            guard.replace_output(spec.name, "And", [_RAW, guard.node("Not", [bad], "fine")])
        elif spec.name == "positions":  # so that the next step knows, too
            guard.replace_output(spec.name, "Where", [bad, guard.constant("minus", -1), _RAW])
    return guard.finished()


def decision_graph(
    model: onnx.ModelProto, inputs: Sequence[TensorSpec], decided: Sequence[TensorSpec]
) -> onnx.ModelProto:
    """The part of an exported graph between its scores and its mask: (scores, inputs) -> what was decided.

    It lets a test feed the very decision that is served with scores of its choice, ties above all.
    """
    from onnx.utils import Extractor

    return Extractor(_with_raw_scores(model)).extract_model(
        ["scores", *(spec.name for spec in inputs)], [spec.name for spec in decided]
    )


def _with_raw_scores(model: onnx.ModelProto) -> onnx.ModelProto:
    """A guarded graph whose ``scores`` are those that its decision reads; any other graph as it is."""
    raws = [node.input[2] for node in model.graph.node if node.name.endswith(f"{_PREFIX}scores")]
    if not raws:
        return model
    changed = deepcopy(model)
    nodes = [node for node in changed.graph.node if "scores" not in node.output]
    _rename(nodes, {raws[0]: "scores"})
    return replace_nodes(changed, nodes)


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Give tensors other names, where nodes make and read them."""
    for node in nodes:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]


class _Guard:
    """A graph that is being guarded: what goes before its nodes, and what after them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = deepcopy(model)
        self._before: list[onnx.NodeProto] = []
        self._after: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._readable: dict[str, str] = {}

    def constant(self, name: str, value: int | list[int] | float) -> str:
        kind = np.float32 if isinstance(value, float) else np.int64
        self._constants.setdefault(name, numpy_helper.from_array(np.array(value, kind), _PREFIX + name))
        return _PREFIX + name

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes) -> str:
        """Add a node before the graph's own, once."""
        output = _PREFIX + name
        if all(output not in each.output for each in self._before):
            self._before.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def within(self, name: str, limit: str) -> str:
        """Rows of an input (B, .) with a value outside 0..limit - 1: (B, 1) bool; the graph sees the nearest inside."""
        zero, one = self.constant("zero", 0), self.constant("one", 1)
        low = self.node("Less", [name, zero], f"{name}/low")
        high = self.node("GreaterOrEqual", [name, limit], f"{name}/high")
        wrong = self.node("Or", [low, high], f"{name}/wrong")
        numbers = self.node("Cast", [wrong], f"{name}/numbers", to=TensorProto.INT64)
        count = self.node("ReduceMax", [numbers, self.constant("axis", [1])], f"{name}/count", keepdims=1)
        last = self.node("Sub", [limit, one], f"{limit.removeprefix(_PREFIX)}/last")
        floor = self.node("Max", [name, zero], f"{name}/floor")
        self._readable[name] = self.node("Min", [floor, last], f"{name}/readable")
        return self.node("Greater", [count, zero], f"{name}/bad")

    def columns(self, name: str) -> str:
        """The size of the second axis, (1,); counted where the values lie: a GPU would be handed it by the host."""
        zero, one, ends = self.constant("zero", 0), self.constant("one", 1), self.constant("ends", [-1])
        shape = self.node("Shape", [name], f"{name}/columns", start=1, end=2)
        width = self.node("Squeeze", [shape], f"{name}/width")
        numbers = self.node("Range", [zero, width, one], f"{name}/places")
        last = self.node("Gather", [numbers, ends], f"{name}/end")
        return self.node("Add", [last, one], f"{name}/size")

    def longer(self, name: str, most: int) -> str:
        """Whether an input (B, N) has more columns than that: () bool."""
        width = self.node("Cast", [self.columns(name)], f"{name}/length", to=TensorProto.INT32)
        limit = self.node("Cast", [self.constant("longest", most)], "longest/length", to=TensorProto.INT32)
        return self.node("Greater", [width, limit], f"{name}/long")

    def any(self, checks: Sequence[str]) -> str:
        bad = checks[0]
        for index, check in enumerate(checks[1:]):
            bad = self.node("Or", [bad, check], f"bad/{index}")
        return bad

    def nothing(self) -> str:
        """NaN; as a constant it would look like a damaged weight."""
        zero = self.constant("nought", 0.0)
        return self.node("Div", [zero, zero], "nan")

    def replace_output(self, name: str, operator: str, inputs: Sequence[str]) -> None:
        """What the graph gave under this name goes through one more node, as its input ``_RAW``."""
        raw = f"{_PREFIX}{name}/raw"
        _rename(self.model.graph.node, {name: raw})
        read = [raw if each == _RAW else each for each in inputs]
        self._after.append(helper.make_node(operator, read, [name], name=_PREFIX + name))

    def finished(self) -> onnx.ModelProto:
        own = list(self.model.graph.node)
        for node in own:
            node.input[:] = [self._readable.get(name, name) for name in node.input]
        self.model.graph.initializer.extend(self._constants.values())
        return replace_nodes(self.model, [*self._before, *own, *self._after])
