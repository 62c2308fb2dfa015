"""ONNX files as data: what an exported graph must look like, and how it is written. torch-free.

An exported file holds what the model computes and nothing else: no stack traces, no paths, no names of
modules, so that the same checkpoint and versions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.compose import add_prefix_graph

from rekd_deploy.contract.signature import GraphSignature, PairSignature
from rekd_deploy.errors import ExportError
from rekd_train import __version__

OPSETS = (18, 19, 20)
"""Opset 18 is the first with what the graphs need; from 23 on TensorRT refuses its Attention."""
RUNTIME_DOMAIN = "com.microsoft"
"""ONNX Runtime's own operators, in fused graphs."""
_NEWEST_IR = 10
"""Triton 24.10's ONNX Runtime (1.19) reads no newer file format."""


class Structure:
    """Who makes and who reads the tensors of a graph, by name. Read-only: make a new one after a change."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in set(node.input) - {""}:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}

    def values(self, name: str) -> np.ndarray:
        """The numbers of a constant."""
        return numpy_helper.to_array(self.constants[name])


def make_node(operator: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node with one output, which it is named after unless told otherwise."""
    return helper.make_node(operator, inputs, [output], name=name or output, **attributes)


def replace_nodes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], added: Iterable[onnx.TensorProto] = ()
) -> onnx.ModelProto:
    """The model itself with other nodes and further constants, without those that no output depends on."""
    needed = {value.name for value in model.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(list(nodes)):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input) - {""}
    constants = [tensor for tensor in (*model.graph.initializer, *added) if tensor.name in needed]
    for field in ("node", "initializer"):
        model.graph.ClearField(field)
    model.graph.node.extend(kept[::-1])
    model.graph.initializer.extend(constants)
    return model


def cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without anything that does not change what the graph computes.

    Raises:
        ExportError: the graph is of a file format or opset that the servers do not read, or a node holds a graph.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    readable = model.ir_version <= _NEWEST_IR and opsets.get("") in OPSETS and not set(opsets) - {"", RUNTIME_DOMAIN}
    if not readable or len(model.functions):
        raise ExportError(
            f"the exporter wrote ONNX IR {model.ir_version} with the opsets {opsets}; servers read IR {_NEWEST_IR} and "
            f"the ONNX opsets {OPSETS}"
        )
    clean = deepcopy(model)
    clean.producer_name, clean.producer_version = "rekd", __version__
    graph = clean.graph
    for part in (clean, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for part, name in ((clean, "domain"), (clean, "model_version"), (graph, "value_info")):
        part.ClearField(name)
    for node in graph.node:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            if attribute.HasField("g") or attribute.graphs:
                raise ExportError(f"the node {node.name} holds a graph of its own, which is not served")
    return clean


def check_interface(model: onnx.ModelProto, signature: GraphSignature, name: str) -> None:
    """Compare a graph's inputs and outputs with the signature: names, order, types and axes.

    Raises:
        ExportError: names every difference, for example an axis that the exporter has frozen.
    """
    wanted = [f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in (*signature.inputs, *signature.outputs)]
    found = [_described(value) for value in (*model.graph.input, *model.graph.output)]
    mistakes = [f"it has {one}, not {other}" for one, other in zip_longest(found, wanted) if one != other]
    if mistakes:
        raise ExportError(f"the exported {name} does not have its signature: {'; '.join(mistakes)}")


def _described(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    kind = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return f"{value.name} {kind} {[axis.dim_param or axis.dim_value for axis in tensor.shape.dim]}"


def check_constants(model: onnx.ModelProto, name: str) -> None:
    """Raise ExportError if a weight or constant is not a finite number, or lies outside the file."""
    tensors = [(tensor.name, tensor) for tensor in model.graph.initializer]
    tensors += [(node.output[0], each.t) for node in model.graph.node for each in node.attribute if each.HasField("t")]
    for label, tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ExportError(f"the exported {name} keeps '{label}' outside the file; weights must be inside")
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            values = values.astype(np.float32)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ExportError(
                f"'{label}' of the exported {name} holds a value that is not finite; the checkpoint is damaged or its "
                "training diverged; fix: train again"
            )


def joined(selector: onnx.ModelProto, predictor: onnx.ModelProto, signature: PairSignature) -> onnx.ModelProto:
    """Both steps in one graph, with the ensemble's inputs and outputs; nothing is computed otherwise than in two.

    Joined as ONNX, not in PyTorch: what was proved, fused or converted of each step is what the whole is made of.
    """
    whole = deepcopy(selector)
    first, second = (
        add_prefix_graph(step.graph, f"{role}/", rename_inputs=False, rename_outputs=False)
        for role, step in (("selector", selector), ("predictor", predictor))
    )
    whole.graph.CopyFrom(first)
    whole.graph.node.extend(second.node)
    whole.graph.initializer.extend(second.initializer)
    outputs = {value.name: value for value in (*first.output, *second.output)}
    whole.graph.ClearField("output")
    whole.graph.output.extend(outputs[spec.name] for spec in signature.ensemble.outputs)
    opsets = {entry.domain: entry.version for entry in (*selector.opset_import, *predictor.opset_import)}
    whole.ClearField("opset_import")
    whole.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in sorted(opsets.items()))
    return whole


def write(model: onnx.ModelProto, path: Path) -> None:
    """Check the graph and write it in one piece, weights inside."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph {path.name} is not valid ONNX: {error}") from None
    path.write_bytes(model.SerializeToString(deterministic=True))
