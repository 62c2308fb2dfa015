"""int8: multiplications by weights in 8-bit integers, with scales that are constants of the graph.

Activations have one scale for the tensor, read once from calibration examples and never from a batch; weights are
signed with one scale for each column. In a graph for ONNX Runtime activations are unsigned and the multiplication is
its operator MatMulIntegerToFloat, which runs on CPUs alone, so the rest is made for CPUs, too. For others activations
are signed around 0, and it is a MatMul between QuantizeLinear and DequantizeLinear. Attention proper, layer norms, sums
and embeddings stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.fusion import norms_apart
from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN, Structure, make_node, replace_nodes
from rekd_deploy.runtimes.base import Arrays
from rekd_deploy.runtimes.onnxruntime import quiet_session

_KEPT = 1 << 15
"""Values of one tensor and example that enter the search for its range."""
_SHARES = np.linspace(0.4, 1.0, 25)
"""Ranges that are tried, as shares of the whole one."""


class Range(NamedTuple):
    """Scale and zero point of 8-bit values: unsigned, or signed around 0."""

    scale: np.float32
    zero_point: np.uint8 | np.int8


def to_int8(
    model: onnx.ModelProto, guarded: set[str], batches: Iterable[Arrays], *, fused: bool = True
) -> onnx.ModelProto:
    """A copy of a graph, whose nodes all have names, with int8 multiplications.

    Args:
        guarded: names of nodes that stay float32.
        batches: inputs to calibrate on, one example each.
        fused: for ONNX Runtime; otherwise as QuantizeLinear and DequantizeLinear.

    Raises:
        ExportError: nothing in the graph multiplies by a weight in a way that int8 serves.
    """
    if fused:
        model = norms_apart(split_attention(model))
    weights = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    chosen = {
        node.name: node.input[0]
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and node.name not in guarded
    }
    if not chosen:
        raise ExportError(
            "int8 serves no multiplication of the model (none of a recurrent layer's); fix: --precision fp16 or fp32"
        )
    # engines know no zero points
    ranges = calibrated_ranges(model, sorted(set(chosen.values())), batches, symmetric=not fused)
    return _quantised(model, set(chosen), ranges, fused)


def split_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every Attention is three MatMuls and a MultiHeadAttention; it computes the same.

    Attention holds the projections of queries, keys and values in itself and has no int8 form that takes all masks.
    """
    structure = Structure(model)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in model.graph.node:
        if node.op_type != "Attention" or node.domain != RUNTIME_DOMAIN:
            nodes.append(node)
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        sizes = attributes.pop("qkv_hidden_sizes", None)
        source, joined, bias, keys, _, term = [*node.input, "", "", ""][:6]
        parts = [f"{node.output[0]}/{letter}" for letter in "qkv"]
        producer = structure.producers.get(joined)
        if producer is not None and producer.op_type == "Concat":
            weights = list(producer.input)
        else:
            values = np.split(structure.values(joined), np.cumsum(sizes[:2]) if sizes else 3, axis=1)
            weights = [f"{joined}/{letter}" for letter in "qkv"]
            constants += map(numpy_helper.from_array, map(np.ascontiguousarray, values), weights)
        for letter, weight, part in zip("qkv", weights, parts, strict=True):
            nodes.append(make_node("MatMul", [source, weight], part, f"{node.name}/{letter}"))
        options = {key: value for key, value in attributes.items() if value}
        whole = make_node("MultiHeadAttention", parts, node.output[0], node.name, domain=RUNTIME_DOMAIN, **options)
        whole.input.extend([bias, keys, term] if term else [bias, keys] if keys else [bias])
        nodes.append(whole)
    return replace_nodes(deepcopy(model), nodes, constants)


def quantised_weight(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (K, N) and the scale of each column, float32 (N,), of a weight (K, N); symmetric.

    x86 processors without VNNI add the products of rows 2k and 2k + 1 in 16 bits, which saturate. Therefore the
    integers of one sign in such a pair add up to at most 128: 255 * 128 < 2**15. Most pairs would anyway.
    """
    pairs = np.pad(values, ((0, len(values) % 2), (0, 0))).reshape(-1, 2, values.shape[1])
    most = np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1)).max(axis=0)
    scales = np.maximum(most / 127, 1e-12).astype(np.float32)  # 127: rounding adds up to 1
    return np.clip(np.rint(values / scales), -127, 127).astype(np.int8), scales


def _quantised(model: onnx.ModelProto, chosen: set[str], ranges: dict[str, Range], fused: bool) -> onnx.ModelProto:
    structure = Structure(model)
    new: dict[str, onnx.TensorProto] = {}
    nodes: dict[str, onnx.NodeProto] = {}

    def constant(name: str, values: Any) -> str:
        new.setdefault(name, numpy_helper.from_array(np.asarray(values), name))
        return name

    def once(operator: str, inputs: list[str], output: str, **attributes: int) -> str:
        nodes.setdefault(output, make_node(operator, inputs, output, f"{operator}/{output}", **attributes))
        return output

    for node in model.graph.node:
        if node.name not in chosen:
            nodes[node.output[0]] = node
            continue
        (source, weight), (result,) = node.input, node.output
        scale = constant(f"{source}/scale", ranges[source].scale)
        zero = constant(f"{source}/zero", ranges[source].zero_point)
        source_int8 = once("QuantizeLinear", [source, scale, zero], f"{source}/int8")
        if not fused:
            rounded = once("DequantizeLinear", [source_int8, scale, zero], f"{source}/rounded")
        integers, scales = quantised_weight(structure.values(weight))
        weight_int8, columns = constant(f"{weight}/int8", integers), constant(f"{weight}/scale", scales)
        # zero points are written: without them older releases of ONNX Runtime abort, and 1.32 takes for the weights
        # the activations' single one
        zeros = constant(f"{weight}/zero", np.zeros(() if fused else len(scales), np.int8))
        if fused:
            inputs = [source_int8, weight_int8, scale, columns, zero, zeros]
            nodes[result] = make_node("MatMulIntegerToFloat", inputs, result, node.name, domain=RUNTIME_DOMAIN)
        else:
            factor = once("DequantizeLinear", [weight_int8, columns, zeros], f"{weight}/rounded", axis=1)
            nodes[result] = make_node("MatMul", [rounded, factor], result, node.name)
    whole = replace_nodes(deepcopy(model), nodes.values(), new.values())
    if not fused:
        return whole
    if RUNTIME_DOMAIN not in {entry.domain for entry in whole.opset_import}:  # nothing was fused before
        whole.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
    return _with_biases(whole)


def _with_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself; additions of biases become part of the multiplications before them."""
    structure, without = Structure(model), {"Add": "Identity", "BiasGelu": "Gelu", "Sum": "Sum"}
    biases: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        readers = structure.readers.get(node.output[0], [])
        if node.op_type == "MatMulIntegerToFloat" and len(readers) == 1 and readers[0].name not in biases:
            columns = structure.constants[node.input[3]].dims  # a bias is a constant with a number for each
            vectors = {name for name, tensor in structure.constants.items() if tensor.dims == columns}
            added = [name for name in readers[0].input if name in vectors and readers[0].op_type in without]
            for bias in added[:1]:
                node.input.append(bias)
                biases[readers[0].name] = bias
        if node.name in biases:
            kept = [name for name in node.input if name != biases[node.name]]
            node = make_node(without[node.op_type], kept, node.output[0], node.name)
        nodes.append(node)
    return replace_nodes(model, nodes)


def calibrated_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Arrays], *, symmetric: bool = False
) -> dict[str, Range]:
    """The range of each of the named tensors of a float32 graph that loses least on the examples.

    Args:
        batches: inputs of the graph; one example each, so that no padding is measured.
        symmetric: signed values, 0 stands for 0; else unsigned ones.
    """
    probe = deepcopy(model)
    probe.graph.ClearField("output")
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    # sums that are split among threads may differ in their last bit, and the scales with them
    session = quiet_session(probe.SerializeToString(), intra_op_num_threads=1)
    wanted = {value.name for value in session.get_inputs()}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    for inputs in batches:
        found = session.run(list(tensors), {name: array for name, array in inputs.items() if name in wanted})
        for name, values in zip(tensors, found, strict=True):
            some = values.ravel()[:: -(-values.size // _KEPT)]
            seen[name].append(np.concatenate([some, [values.min(), values.max()]]).astype(np.float32))
    return {name: best_range(np.concatenate(values), symmetric=symmetric) for name, values in seen.items()}


def best_range(values: np.ndarray, *, symmetric: bool = False) -> Range:
    """The range around 0 with the least squared error; values beyond it are held at its ends."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    least, most = (-127, 127) if symmetric else (0, 255)

    def range_of(low: float, high: float) -> Range:
        if symmetric:
            return Range(np.float32(max(-low, high, 127e-8) / 127), np.int8(0))
        scale = np.float32(max((high - low) / 255, 1e-8))
        return Range(scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255)))

    def error(candidate: Range) -> float:
        zero = int(candidate.zero_point)
        quantised = np.clip(np.rint(values / candidate.scale) + zero, least, most)
        return float(np.mean(((quantised - zero) * candidate.scale - values) ** 2))

    return min((range_of(low * share, high * share) for share in _SHARES[::-1]), key=error)
