"""int8: multiplications by weights in 8-bit integers, with scales that are constants of the graph.

Activations have one scale for the tensor, calibrated; weights are signed with one scale for each column, and such that
every processor adds the products exactly (``quantised_weight``). In a graph for ONNX Runtime activations are unsigned
and the multiplication is its operator MatMulIntegerToFloat; for others they are signed around 0, and it is a MatMul
between QuantizeLinear and DequantizeLinear. Attention proper, layer norms, sums and embeddings stay float32.
MatMulIntegerToFloat runs on CPUs alone, so the rest of such a graph is made for CPUs, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.fusion_cpu import norms_apart
from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN
from rekd_deploy.graphs.precision.attention import split_attention
from rekd_deploy.graphs.precision.calibration import Range, calibrated_ranges
from rekd_deploy.graphs.precision.structure import Structure, name_nodes
from rekd_deploy.runtimes.base import Arrays


def to_int8(
    model: onnx.ModelProto, guarded: set[str], batches: Iterable[Arrays], *, fused: bool = True
) -> onnx.ModelProto:
    """The graph with int8 multiplications.

    Args:
        guarded: names of nodes that stay float32.
        batches: inputs to calibrate on, one example each.
        fused: for ONNX Runtime; otherwise as QuantizeLinear and DequantizeLinear.

    Raises:
        ExportError: nothing in the graph multiplies by a weight in a way that int8 serves.
    """
    model = name_nodes(model)
    if fused:
        model = norms_apart(split_attention(model))
    structure = Structure(model)
    chosen = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and structure.is_linear(node) and node.name not in guarded
        and len(structure.constants[node.input[1]].dims) == 2
    ]
    if not chosen:
        raise ExportError(
            "the model has no multiplication that int8 serves (recurrent layers have none); fix: --precision fp16 or "
            "fp32"
        )
    # engines know no zero points
    ranges = calibrated_ranges(model, sorted({node.input[0] for node in chosen}), batches, symmetric=not fused)
    return _quantised(model, {node.name for node in chosen}, ranges, fused)


def quantised_weight(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (K, N) and the scale of each column, float32 (N,), of a weight (K, N); symmetric.

    x86 processors without VNNI add the products of rows 2k and 2k + 1 in 16 bits, which saturate. Therefore the
    integers of one sign in such a pair add up to at most 128: 255 * 128 < 2**15. Most pairs would anyway.
    """
    pairs = np.pad(values, ((0, len(values) % 2), (0, 0))).reshape(-1, 2, values.shape[1])
    most = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1)).max(axis=0)
    scales = np.maximum(most / 127, 1e-12).astype(np.float32)  # 127: rounding adds up to 1
    return np.clip(np.rint(values / scales), -127, 127).astype(np.int8), scales


def _quantised(
    model: onnx.ModelProto, chosen: set[str], ranges: dict[str, Range], fused: bool
) -> onnx.ModelProto:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    new: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    quantised: set[str] = set()

    def constant(name: str, values: np.ndarray) -> str:
        new.setdefault(name, numpy_helper.from_array(values, name))
        return name

    for node in model.graph.node:
        if node.name not in chosen:
            nodes.append(node)
            continue
        source, weight = node.input
        scale = constant(f"{source}/scale", np.asarray(ranges[source].scale))
        zero = constant(f"{source}/zero", np.asarray(ranges[source].zero_point))
        if source not in quantised:
            quantised.add(source)
            nodes.append(_node("QuantizeLinear", [source, scale, zero], f"{source}/int8"))
            if not fused:
                nodes.append(_node("DequantizeLinear", [f"{source}/int8", scale, zero], f"{source}/rounded"))
        integers, scales = quantised_weight(numpy_helper.to_array(constants[weight]))
        int8, columns = constant(f"{weight}/int8", integers), constant(f"{weight}/scale", scales)
        if fused:
            # older releases of ONNX Runtime abort where the zero point is left out
            inputs = [f"{source}/int8", int8, scale, columns, zero, constant(f"{weight}/zero", np.zeros((), np.int8))]
            nodes.append(_node("MatMulIntegerToFloat", inputs, node.output[0], node.name, domain=RUNTIME_DOMAIN))
        else:
            if f"{weight}/rounded" not in quantised:
                quantised.add(f"{weight}/rounded")
                # without zero points for the weights ONNX Runtime 1.32 takes the activations' single one for them
                zeros = constant(f"{weight}/zero", np.zeros(len(scales), np.int8))
                nodes.append(_node("DequantizeLinear", [int8, columns, zeros], f"{weight}/rounded", axis=1))
            nodes.append(_node("MatMul", [f"{source}/rounded", f"{weight}/rounded"], node.output[0], node.name))
    whole = _assembled(model, nodes, [*model.graph.initializer, *new.values()])
    return with_biases(whole) if fused else whole


def _node(operator: str, inputs: Sequence[str], output: str, name: str = "", **attributes) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), [output], name=name or f"{operator}/{output}", **attributes)


def _assembled(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for field, entries in (("node", nodes), ("initializer", [one for one in constants if one.name in used])):
        whole.graph.ClearField(field)
        getattr(whole.graph, field).extend(entries)
    return whole


def with_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """The additions of biases become part of the multiplications before them."""
    structure = Structure(model)
    folded: dict[str, tuple[str, str]] = {}
    for node in model.graph.node:
        if node.op_type != "MatMulIntegerToFloat":
            continue
        readers = structure.readers.get(node.output[0], [])
        bias = _bias_of(readers[0], node, structure) if len(readers) == 1 else None
        if bias:
            folded[node.name] = (bias, readers[0].name)
    adders = {reader: name for name, (_, reader) in folded.items()}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        if node.name in folded:
            changed.input.append(folded[node.name][0])
        if node.name in adders:
            bias = folded[adders[node.name]][0]
            kept = [name for name in node.input if name != bias]
            operator = {"Add": "Identity", "BiasGelu": "Gelu", "Sum": "Sum"}[node.op_type]
            changed = _node(operator, kept, node.output[0], node.name)
        nodes.append(changed)
    return _assembled(model, nodes, model.graph.initializer)


def _bias_of(reader: onnx.NodeProto, multiplication: onnx.NodeProto, structure: Structure) -> str | None:
    """The constant vector, one number for each column, that the reader adds."""
    if reader.op_type not in ("Add", "BiasGelu", "Sum"):
        return None
    columns = list(structure.constants[multiplication.input[3]].dims)
    return next(
        (name for name in reader.input if name in structure.constants
         and list(structure.constants[name].dims) == columns),
        None,
    )
