"""Graphs for ONNX Runtime: attention, embeddings, skip-layer-norm and GELU as its own single operators.

The exporter writes attention as MatMul, Softmax, MatMul; ONNX Runtime does not put it together again by itself.
onnxscript's rules do most (``fuse``); three rewrites of finished graphs do the rest. Fused graphs run on ONNX Runtime
alone, and the parity gate runs on them. torch-free.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from rekd_deploy.contract.signature import SLOTS
from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN, Structure, make_node, replace_nodes

if TYPE_CHECKING:
    import onnx_ir

_NORMS = {"LayerNormalization": (1, 1e-5), "SkipLayerNormalization": (2, 1e-12)}
"""How many of the first inputs are summands, and the operator's default of epsilon."""
_MASK_INPUTS = {"Attention": (3, 5), "MultiHeadAttention": (4, 5)}
"""By operator: the input that takes a mask of keys, and the one that takes a term to add."""
_INVISIBLE = -1e4
"""A term of at most that hides a key: exp of it is 0."""


def fuse(model: onnx_ir.Model) -> onnx.ModelProto:
    """The fused graph of torch.onnx.export's ``program.model``, which is changed.

    A graph that is read from a file will not do: the rules need the shapes in between.
    """
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    _read_slots_from_tensor(model)
    fused, _ = optimize_for_ort(model, clear_metadata=True)
    return _rms_norms_in_parts(onnx_ir.serde.serialize_model(fused))


def fused_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many of each of ONNX Runtime's own operators a graph holds; empty for a graph that was not fused."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node if node.domain == RUNTIME_DOMAIN).items()))


def _read_slots_from_tensor(model: onnx_ir.Model) -> None:
    """Read a size that the exporter computes, as 1 + slots, from a tensor that has it: fusions know no other; changes
    ``model``."""
    import onnx_ir

    computed = [value for node in model.graph for value in node.outputs if value.shape is not None]
    axes = [(value, [str(size) for size in value.shape]) for value in computed]
    having = next(((value, sizes.index(f"{SLOTS} + 1")) for value, sizes in axes if f"{SLOTS} + 1" in sizes), None)
    sums = [value for value in computed if value.producer().op_type == "Add" and value.shape.rank() == 0]
    shapes = [[reader for reader in total.consumers() if reader.op_type == "Reshape"] for total in sums]
    if having is None or not any(shapes):
        return
    tensor, axis = having
    attributes = [onnx_ir.AttrInt64("start", axis), onnx_ir.AttrInt64("end", axis + 1)]
    shape = onnx_ir.Node("", "Shape", [tensor], attributes, num_outputs=1, name="slots/size")
    size = shape.outputs[0]
    size.name, size.dtype, size.shape = "slots/size", onnx_ir.DataType.INT64, onnx_ir.Shape([1])
    model.graph.insert_after(tensor.producer(), shape)
    for reader in next(filter(None, shapes)):
        reader.outputs[0].replace_all_uses_with(size)


# SkipLayerNormalization is not vectorised on CPUs: five to fifteen times the time of a sum and a LayerNormalization,
# a fifth to two thirds of a small network's time. On GPUs it is the faster variant, and stays.


def norms_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every SkipLayerNormalization is a Sum and a LayerNormalization; it computes the same."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "SkipLayerNormalization":
            nodes.append(node)
            continue
        summed, skip, scale, shift, bias = [*node.input, "", ""][:5]
        total = [*node.output, "", "", ""][3] or f"{node.output[0]}/sum"
        name = node.name or node.output[0]
        parameters = [total, scale, shift] if shift else [total, scale]
        nodes += [
            # Sum, not Add: ONNX Runtime would fuse an Add again at load time
            make_node("Sum", [summed, skip, bias] if bias else [summed, skip], total, f"{name}/sum"),
            make_node("LayerNormalization", parameters, node.output[0], name, axis=-1, epsilon=_epsilon(node, 1e-5)),
        ]
    return replace_nodes(deepcopy(model), nodes)


def _rms_norms_in_parts(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself with ONNX's own operators for a norm that ONNX does not have; ONNX Runtime fuses it at load."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in model.graph.node:
        if node.op_type != "SimplifiedLayerNormalization":
            nodes.append(node)
            continue
        (values, scale), name = node.input, node.output[0]
        parts = {"two": np.float32(2), "axis": np.array([-1]), "epsilon": np.float32(_epsilon(node, 1e-5))}
        constants += [numpy_helper.from_array(np.asarray(value), f"{name}/{part}") for part, value in parts.items()]
        nodes += [
            make_node("Pow", [values, f"{name}/two"], f"{name}/square"),
            make_node("ReduceMean", [f"{name}/square", f"{name}/axis"], f"{name}/mean", keepdims=1),
            make_node("Add", [f"{name}/mean", f"{name}/epsilon"], f"{name}/variance"),
            make_node("Sqrt", [f"{name}/variance"], f"{name}/deviation"),
            make_node("Div", [values, f"{name}/deviation"], f"{name}/normal"),
            make_node("Mul", [f"{name}/normal", scale], name),
        ]
    return replace_nodes(model, nodes, constants)


def _epsilon(node: onnx.NodeProto, default: float) -> float:
    return next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), default)


# The fusions hand attention its mask as a term (B, 1, N, N) that is added to the products of queries and keys. ONNX
# Runtime 1.19 (Triton 24.10) loads such a graph and fails at the first request, for it wants that term for each head.
# All versions take the mask of keys (B, N) that the term was made from, which also saves making it.


def masked_by_keys(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which attention takes a mask of keys; a term that is no mask of keys stays as it is."""
    changed = deepcopy(model)
    structure = Structure(changed)
    nodes: dict[str, onnx.NodeProto] = {}
    for node in changed.graph.node:
        if has_added_mask(node):
            index, term = _MASK_INPUTS[node.op_type]
            keys = _keys(node.input[term], structure)
            if keys is not None and not node.input[index] and not any(node.input[term + 1 :]):
                mask = f"{keys}/visible"
                nodes.setdefault(mask, make_node("Cast", [keys], mask, to=TensorProto.INT32))
                node.input[:] = [*node.input[:index], mask]
        nodes[node.output[0]] = node
    return replace_nodes(changed, nodes.values())


def has_added_mask(node: onnx.NodeProto) -> bool:
    """Whether the node is a fused attention with a term that is added to its products."""
    if node.domain != RUNTIME_DOMAIN or node.op_type not in _MASK_INPUTS:
        return False
    return any(node.input[_MASK_INPUTS[node.op_type][1] :][:1])


def _keys(name: str, structure: Structure) -> str | None:
    """The mask (B, N) that a term or condition (B, 1, .., N) repeats for every query; None: it is another thing."""
    node = structure.producers.get(name)
    match node.op_type if node is not None else "":
        case "Where" if _hides(node, structure):
            return _keys(node.input[0], structure)
        case "Expand":
            return _keys(node.input[0], structure)
        case "And":  # with what depends on sizes alone; where that is a window, the whole is no mask of keys
            sides = [side for side in node.input if _depends_on_values(side, structure)]
            windows = [side for side in node.input if side not in sides and not _always_true(side, structure)]
            return _keys(sides[0], structure) if len(sides) == 1 and not windows else None
        case "GatherND" | "Unsqueeze":
            source = structure.producers.get(node.input[0])
            return None if source is not None and source.op_type == "Where" else node.input[0]  # a term is no mask
    return None


def _always_true(name: str, structure: Structure) -> bool:
    """Whether a condition on sizes compares nothing but indices with 0, as the library's mask of everything does."""
    node = structure.producers.get(name)
    if node is None:
        return name not in structure.constants or bool(np.all(structure.values(name)))
    if node.op_type in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Not"):
        bound = node.input[1] if len(node.input) > 1 else ""
        zero = bound in structure.constants and bool(np.all(structure.values(bound) <= 0))
        return node.op_type == "GreaterOrEqual" and zero
    return all(_always_true(source, structure) for source in node.input if _is_condition(source, structure))


def _is_condition(name: str, structure: Structure) -> bool:
    """Whether comparisons lie behind a tensor."""
    node = structure.producers.get(name)
    if node is None:
        return False
    if node.op_type in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Not"):
        return True
    return any(_is_condition(source, structure) for source in node.input)


def _hides(node: onnx.NodeProto, structure: Structure) -> bool:
    """Whether a Where gives 0 for true and a hiding term for false."""
    if not structure.constants.keys() >= set(node.input[1:]):
        return False
    visible, hidden = map(structure.values, node.input[1:])
    return bool(np.all(visible == 0) and np.all(hidden <= _INVISIBLE))


def _depends_on_values(name: str, structure: Structure) -> bool:
    """Whether more than the sizes of the graph's inputs decide a tensor."""
    node = structure.producers.get(name)
    if node is None:
        return bool(name) and name not in structure.constants
    return node.op_type != "Shape" and any(_depends_on_values(source, structure) for source in node.input)


# onnxscript's fusions leave the embeddings of a BERT apart. They are joined after a conversion to another precision,
# and only where the tables are still float32: what the operator does in half precision is another matter.


def embeddings_together(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the embeddings of a BERT are one EmbedLayerNormalization; other graphs stay as they are."""
    structure = Structure(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        summands, default = _NORMS.get(node.op_type, (0, 0.0))
        lookups = _lookups(node, summands, structure)
        if lookups is None:
            nodes.append(node)
            continue
        name = node.name or node.output[0]
        words, positions, types = indices = [f"{name}/{what}" for what in ("words", "positions", "types")]
        tables, norm = [lookup.input[0] for lookup in lookups], node.input[summands : summands + 2]
        for lookup, index in zip(lookups, indices, strict=True):
            nodes.append(make_node("Cast", [lookup.input[1]], index, to=TensorProto.INT32))
        whole = make_node(
            "EmbedLayerNormalization", [words, types, *tables, *norm, "", positions], node.output[0], name,
            domain=RUNTIME_DOMAIN, epsilon=_epsilon(node, default),
        )
        whole.output.append("")
        nodes.append(whole)
    return replace_nodes(deepcopy(model), nodes)


def _lookups(norm: onnx.NodeProto, summands: int, structure: Structure) -> list[onnx.NodeProto] | None:
    """The look-ups of words, positions and types whose sum is normalised; None where it is another sum."""
    parameters = norm.input[summands : summands + 2]
    if not summands or len(parameters) < 2 or any(norm.input[summands + 2 :]):
        return None
    if not structure.constants.keys() >= set(parameters) or structure.readers.keys() & set(norm.output[1:]):
        return None
    leaves = [leaf for name in norm.input[:summands] for leaf in _leaves(name, structure)]
    if len(leaves) != 3 or not all(_is_lookup(leaf, structure) for leaf in leaves):
        return None
    words = [leaf for leaf in leaves if _reads_ids(leaf.input[1], structure)]
    if len(words) != 1:
        return None
    rest = [leaf for leaf in leaves if leaf is not words[0]]
    types, positions = sorted(rest, key=lambda leaf: structure.constants[leaf.input[0]].dims[0])
    return [*words, positions, types]


def _reads_ids(name: str, structure: Structure) -> bool:
    """Whether a tensor is made of the values of ``input_ids``, not of their shape alone."""
    node = structure.producers.get(name)
    if node is None or node.op_type == "Shape":
        return name == "input_ids"
    return any(_reads_ids(source, structure) for source in node.input)


def _leaves(name: str, structure: Structure) -> list[onnx.NodeProto | None]:
    """The nodes whose results a sum is made of; None for what no node makes."""
    node = structure.producers.get(name)
    if node is not None and node.op_type in ("Add", "Sum") and len(structure.readers[name]) == 1:
        return [leaf for source in node.input for leaf in _leaves(source, structure)]
    return [node]


def _is_lookup(node: onnx.NodeProto | None, structure: Structure) -> bool:
    if node is None or node.op_type != "Gather" or any(attribute.i for attribute in node.attribute):  # another axis
        return False
    table = structure.constants.get(node.input[0])
    return table is not None and table.data_type == TensorProto.FLOAT and len(table.dims) == 2
