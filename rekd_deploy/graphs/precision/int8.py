"""int8: multiplications by weights in 8-bit integers, with scales that are constants of the graph.

Activations have one scale for the tensor, read once from calibration examples and never from a batch; weights are
signed with one scale for each column, and such that every processor adds the products exactly (``quantised_weight``).
In a graph for ONNX Runtime activations are unsigned and the multiplication is its operator MatMulIntegerToFloat; for
others they are signed around 0, and it is a MatMul between QuantizeLinear and DequantizeLinear. Attention proper, layer
norms, sums and embeddings stay float32.
MatMulIntegerToFloat runs on CPUs alone, so the rest of such a graph is made for CPUs, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs.fusion import norms_apart
from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN, Structure, replace_nodes
from rekd_deploy.graphs.precision.structure import is_linear, name_nodes, split_attention
from rekd_deploy.runtimes.base import Arrays
from rekd_deploy.runtimes.onnxruntime import quiet_session

_KEPT = 1 << 15
"""Values of one tensor and example that enter the search for its range."""
_SHARES = np.linspace(0.4, 1.0, 25)
"""Ranges that are tried, as shares of the whole one."""


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
        if node.op_type == "MatMul" and is_linear(node, structure) and node.name not in guarded
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
    whole = replace_nodes(deepcopy(model), nodes, [*model.graph.initializer, *new.values()])
    return _with_biases(whole) if fused else whole


def _node(operator: str, inputs: Sequence[str], output: str, name: str = "", **attributes) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), [output], name=name or f"{operator}/{output}", **attributes)


def _with_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself; additions of biases become part of the multiplications before them."""
    structure = Structure(model)
    adders: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            readers = structure.readers.get(node.output[0], [])
            bias = _bias_of(readers[0], node, structure) if len(readers) == 1 else None
            if bias and readers[0].name not in adders:
                node.input.append(bias)
                adders[readers[0].name] = bias
        if node.name in adders:
            kept = [name for name in node.input if name != adders[node.name]]
            operator = {"Add": "Identity", "BiasGelu": "Gelu", "Sum": "Sum"}[node.op_type]
            node = _node(operator, kept, node.output[0], node.name)
        nodes.append(node)
    return replace_nodes(model, nodes, model.graph.initializer)


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


@dataclass(frozen=True)
class Range:
    """Scale and zero point of 8-bit values: unsigned, or signed around 0."""

    scale: np.float32
    zero_point: np.uint8 | np.int8


def calibrated_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Arrays], *, symmetric: bool = False
) -> dict[str, Range]:
    """The range of each tensor that loses least on the examples.

    Args:
        model: a float32 graph.
        tensors: names of float32 tensors in it.
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
            seen[name].append(_some(values.ravel()))
    return {name: best_range(np.concatenate(values), symmetric=symmetric) for name, values in seen.items()}


def _some(values: np.ndarray) -> np.ndarray:
    """Evenly spaced values and the two extremes."""
    step = -(-values.size // _KEPT)
    return np.concatenate([values[::step], [values.min(), values.max()]]).astype(np.float32)


def best_range(values: np.ndarray, *, symmetric: bool = False) -> Range:
    """The range around 0 with the least squared error; values beyond it are held at its ends."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    least_value, most, range_of = (-127, 127, _symmetric_range) if symmetric else (0, 255, _range)
    best, least = range_of(low, high), np.inf
    for share in _SHARES[::-1]:
        candidate = range_of(low * share, high * share)
        quantised = np.clip(np.rint(values / candidate.scale) + int(candidate.zero_point), least_value, most)
        error = float(np.mean(((quantised - int(candidate.zero_point)) * candidate.scale - values) ** 2))
        if error < least:
            best, least = candidate, error
    return best


def _symmetric_range(low: float, high: float) -> Range:
    return Range(np.float32(max(-low, high, 127e-8) / 127), np.int8(0))


def _range(low: float, high: float) -> Range:
    scale = np.float32(max((high - low) / 255, 1e-8))
    return Range(scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255)))
