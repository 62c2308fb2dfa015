"""What a converter must know of a graph: who makes and who reads a tensor, its type, and what may not be touched."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from rekd_deploy.errors import ExportError
from rekd_deploy.runtimes.onnxruntime import onnx_runtime

LINEAR = ("MatMul", "Gemm")


class Structure:
    """A graph's tensors by name. Read-only: make a new one after a change.

    Args:
        model: no node may hold a graph of its own.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in set(node.input) - {""}:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}

    def is_linear(self, node: onnx.NodeProto) -> bool:
        """Whether the node multiplies by a weight."""
        return node.op_type in LINEAR and node.input[1] in self.constants

    def float_tensors(self) -> set[str]:
        """Names of all float32 tensors, as ONNX Runtime infers them; ONNX does not know the fused operators' types.

        Raises:
            ExportError: ONNX Runtime cannot load the graph.
        """
        runtime = onnx_runtime()
        probe = onnx.ModelProto()
        probe.CopyFrom(self.model)
        probe.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in self.producers if name not in self.outputs
        )
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        try:
            session = runtime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions share no root
            raise ExportError(f"the types of the graph cannot be inferred: {str(error).splitlines()[0]}") from None
        values = (*session.get_inputs(), *session.get_outputs())
        typed = {value.name for value in values if value.type == "tensor(float)"}
        return typed | {name for name, tensor in self.constants.items() if tensor.data_type == onnx.TensorProto.FLOAT}

    def guarded(self, output: str, linears: int) -> set[str]:
        """Names of the nodes that stay float32: the head that makes ``output``, and all that follows from it.

        Args:
            output: 'scores' or 'logits'.
            linears: how many linear layers the head has.

        Raises:
            ExportError: the graph has no such head.
        """
        head: dict[str, onnx.NodeProto] = {}
        found = self._walk_back(output, linears, head)
        if not found:
            raise ExportError(f"no head with {linears} linear layers leads to '{output}'; fix: export as fp32")
        return set(head) | {node.name for node in self.following([output])}

    def _walk_back(self, tensor: str, linears: int, head: dict[str, onnx.NodeProto]) -> bool:
        node = self.producers.get(tensor)
        if node is None:
            return False
        head[node.name] = node
        if self.is_linear(node) and (linears := linears - 1) == 0:
            return True
        return any([self._walk_back(name, linears, head) for name in node.input if name not in self.constants])

    def following(self, tensors: Iterable[str]) -> list[onnx.NodeProto]:
        """Every node that depends on one of the tensors, in order."""
        reached = set(tensors)
        found = []
        for node in self.model.graph.node:
            if reached & set(node.input):
                reached |= set(node.output)
                found.append(node)
        return found


def name_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes all have names of their own: the first output's where one is missing or taken."""
    named = onnx.ModelProto()
    named.CopyFrom(model)
    taken: set[str] = set()
    for node in named.graph.node:
        if not node.name or node.name in taken:
            node.name = f"node/{next(name for name in node.output if name)}"
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ExportError(f"the node {node.name} holds a graph of its own; only fp32 is served")
        taken.add(node.name)
    return named


def fresh_name(wanted: str, taken: set[str]) -> str:
    """``wanted``, or that with a number, and noted as taken."""
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}.{count}"
    taken.add(name)
    return name
