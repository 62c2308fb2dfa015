"""ONNX files as data: what an exported graph must look like, and how it is written. torch-free.

An exported file holds what the model computes and nothing else: no stack traces, no paths, no names of
modules, so that the same checkpoint and versions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rekd_deploy.contract.signature import GraphSignature, PairSignature, TensorSpec
from rekd_deploy.errors import ExportError
from rekd_train import __version__

OPSETS = (18, 19, 20)
"""Opset 18 is the first with what the graphs need; from 23 on TensorRT refuses its Attention."""
RUNTIME_DOMAIN = "com.microsoft"
"""ONNX Runtime's own operators, in fused graphs."""
_NEWEST_IR = 10
"""Triton 24.10's ONNX Runtime (1.19) reads no newer file format."""
_ELEMENT_TYPES = {
    "int64": onnx.TensorProto.INT64, "float32": onnx.TensorProto.FLOAT, "bool": onnx.TensorProto.BOOL,
    "uint8": onnx.TensorProto.UINT8,
}


class Structure:
    """Who makes and who reads the tensors of a graph, by name. Read-only: make a new one after a change.

    Args:
        model: no node may hold a graph of its own.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in set(node.input) - {""}:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}


def replace_nodes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], constants: Iterable[onnx.TensorProto] | None = None
) -> onnx.ModelProto:
    """The model itself with other nodes and, where they are given, those of the constants that are still read."""
    nodes = list(nodes)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    if constants is not None:
        read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
        kept = [tensor for tensor in constants if tensor.name in read]
        model.graph.ClearField("initializer")
        model.graph.initializer.extend(kept)
    return model


def without_unread(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself without the nodes and constants that no output depends on."""
    needed = {value.name for value in model.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input) - {""}
    return replace_nodes(model, kept[::-1], model.graph.initializer)


def cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without anything that does not change what the graph computes.

    Raises:
        ExportError: the graph is of a file format or opset that the servers do not read.
    """
    if model.ir_version > _NEWEST_IR:
        raise ExportError(f"the exporter wrote ONNX IR {model.ir_version}; servers read up to {_NEWEST_IR}")
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") not in OPSETS or set(opsets) - {"", RUNTIME_DOMAIN} or len(model.functions):
        raise ExportError(f"the exporter used the opsets {opsets}; only the ONNX opsets {OPSETS} are served")
    clean = deepcopy(model)
    clean.producer_name, clean.producer_version = "rekd", __version__
    for field in ("domain", "model_version", "doc_string", "metadata_props"):
        clean.ClearField(field)
    _strip(clean.graph)
    return clean


def _strip(graph: onnx.GraphProto) -> None:
    for field in ("doc_string", "metadata_props", "value_info"):
        graph.ClearField(field)
    for entry in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        entry.ClearField("doc_string")
        entry.ClearField("metadata_props")
    for node in graph.node:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _strip(subgraph)


def check_interface(model: onnx.ModelProto, signature: GraphSignature, name: str) -> None:
    """Compare a graph's inputs and outputs with the signature: names, order, types and axes.

    Raises:
        ExportError: names every difference, for example an axis that the exporter has frozen.
    """
    mistakes = []
    for kind, values, specs in (
        ("input", model.graph.input, signature.inputs), ("output", model.graph.output, signature.outputs),
    ):
        found, wanted = [value.name for value in values], [spec.name for spec in specs]
        if found != wanted:
            mistakes.append(f"{kind}s are {found}, the signature has {wanted}")
            continue
        mistakes += [m for value, spec in zip(values, specs, strict=True) if (m := _difference(kind, value, spec))]
    if mistakes:
        raise ExportError(f"the exported {name} does not have its signature: " + "; ".join(mistakes))


def _difference(kind: str, value: onnx.ValueInfoProto, spec: TensorSpec) -> str | None:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    if tensor.elem_type != _ELEMENT_TYPES[spec.dtype]:
        found = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return f"{kind} '{spec.name}' is {found}, not {spec.dtype}"
    if shape != spec.shape:
        return f"{kind} '{spec.name}' has the shape {shape}, not {spec.shape}"
    return None


def check_constants(model: onnx.ModelProto, name: str) -> None:
    """Raise ExportError if a weight or constant is not a finite number, or lies outside the file."""
    tensors = [(tensor.name, tensor) for tensor in model.graph.initializer] + [
        (node.output[0], attribute.t)
        for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")
    ]
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
    shared = {spec.name for spec in (*signature.selector.inputs, *signature.handover, *signature.predictor.outputs)}
    _rename(whole.graph, "selector/", {spec.name for spec in (*signature.selector.inputs, *signature.selector.outputs)})
    second = deepcopy(predictor.graph)
    _rename(second, "predictor/", shared)
    whole.graph.node.extend(second.node)
    whole.graph.initializer.extend(second.initializer)
    outputs = {value.name: value for value in (*whole.graph.output, *second.output)}
    whole.graph.ClearField("output")
    whole.graph.output.extend(outputs[spec.name] for spec in signature.ensemble.outputs)
    opsets = {entry.domain: entry.version for entry in (*selector.opset_import, *predictor.opset_import)}
    whole.ClearField("opset_import")
    whole.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in sorted(opsets.items()))
    return whole


def _rename(graph: onnx.GraphProto, prefix: str, keep: set[str]) -> None:
    """Put ``prefix`` before every name but those in ``keep`` and '' (an input that is left out)."""

    def renamed(name: str) -> str:
        return name if not name or name in keep else prefix + name

    for node in graph.node:
        node.name = prefix + node.name
        for names in (node.input, node.output):
            names[:] = [renamed(name) for name in names]
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ExportError(f"the node {node.name} holds a graph of its own, which cannot be joined to another")
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)


def write(model: onnx.ModelProto, path: Path) -> None:
    """Check the graph and write it in one piece, weights inside."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph {path.name} is not valid ONNX: {error}") from None
    path.write_bytes(model.SerializeToString(deterministic=True))
