"""Precision as a property of the graph: what stays float32, what overflows nowhere, and answers without neighbours."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from precisions import answers, assert_no_neighbours, conversion_of, convert, converted, examples_of, model_of, traced

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs import onnx_model
from rekd_deploy.graphs.half import MASKED, float_tensors, to_half
from rekd_deploy.graphs.modules import head_layers, pair_signature
from rekd_deploy.graphs.onnx_model import Structure
from rekd_deploy.graphs.precision import HEAD_OUTPUTS, guarded_nodes, multiplications, name_nodes, observed_precision
from rekd_deploy.parity.examples import constructed_inputs

pytestmark = pytest.mark.slow

CASES = [
    (kind, precision, fused)
    for kind, fused in (("bert", True), ("bert", False), ("bert-zero", True), ("vit", True), ("bilstm", True))
    for precision in (("fp32", "fp16") if kind == "bilstm" else ("fp32", "fp16", "bf16", "int8"))
]
every_case = pytest.mark.parametrize(("kind", "precision", "fused"), CASES)
every_conversion = pytest.mark.parametrize(
    ("kind", "precision", "fused"), [case for case in CASES if case[1] != "fp32"]
)


@every_case
def test_an_answer_has_no_neighbours(kind, precision, fused, texts):
    assert_no_neighbours(model_of(kind), converted(kind, precision, fused), texts)


@every_conversion
def test_interface_stays_and_the_precision_is_the_one_asked_for(kind, precision, fused):
    conversion, signature = conversion_of(kind, precision, fused), pair_signature(model_of(kind))
    heads = head_layers(model_of(kind))
    assert conversion.precisions["predictor"] == precision
    assert [role for role, kept in conversion.precisions.items() if kept != precision] == list(conversion.notes)
    for role, model in conversion.models.items():
        onnx_model.check_interface(model, signature.graph(role), role)
        onnx_model.check_constants(model, role)
        onnx.checker.check_model(model, full_check=True)
        counts = multiplications(model)
        assert observed_precision(counts, heads[role]) == conversion.precisions[role]
        assert role in conversion.notes or counts["fp32"] == heads[role], "the head, and nothing else"


def test_a_selector_whose_rationales_int8_would_change_stays_float32():
    conversion = conversion_of("vit", "int8", True)
    assert conversion.precisions == {"selector": "fp32", "predictor": "int8"}
    assert "8 of 768 real positions are flipped, 1.04% (limit 0.50%)" in conversion.notes["selector"]
    before, after = (graphs["selector"] for graphs in (traced("vit", True), conversion.models))
    assert after == name_nodes(before)
    assert conversion_of("bert", "int8", True).precisions == {"selector": "int8", "predictor": "int8"}


@every_conversion
def test_head_and_decision_stay_as_they_are(kind, precision, fused):
    """Node by node and constant by constant, from the head's first layer to the last output."""
    heads = head_layers(model_of(kind))
    for role, after in converted(kind, precision, fused).items():
        before, after = name_nodes(traced(kind, fused)[role]), name_nodes(after)
        guarded = guarded_nodes(before, HEAD_OUTPUTS[role], heads[role])
        assert len(guarded) > (10 if role == "selector" else 1)
        old, new = ({node.name: node for node in graph.graph.node} for graph in (before, after))
        constants = [{t.name: t for t in graph.graph.initializer} for graph in (before, after)]
        for name in guarded:
            assert (old[name].op_type, old[name].attribute) == (new[name].op_type, new[name].attribute)
            for first, second in zip(old[name].input, new[name].input, strict=True):
                if first in constants[0]:
                    assert first == second and constants[0][first] == constants[1][second]
        reached = {HEAD_OUTPUTS[role]}
        for node in after.graph.node:
            if reached & set(node.input):
                assert node.name in guarded, "nothing was put between the scores and the outputs"
                reached |= set(node.output)


@pytest.mark.parametrize(("kind", "precision", "fused"), [case for case in CASES if case[1] in ("fp16", "bf16")])
def test_half_precision_holds_no_constant_beyond_it_and_the_decision_keeps_its_own(kind, precision, fused):
    for role, model in conversion_of(kind, precision, fused).models.items():
        kinds = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        halves = [numpy_helper.to_array(t).astype(np.float32) for t in model.graph.initializer if t.data_type in kinds]
        assert len(halves) > 5
        assert all(np.isfinite(values).all() and (values >= MASKED * 1.01).all() for values in halves)
        if role == "selector":
            singles = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
            lowest = [values for values in singles if values.shape == () and values == np.finfo(np.float32).min]
            assert lowest, "unselectable positions still rank below every score"


@pytest.mark.parametrize(("kind", "fused"), [("bert", True), ("bert", False), ("bert-zero", True), ("vit", True)])
def test_nothing_overflows_in_half_precision(kind, fused):
    """Every tensor in between, on padded, shortest and longest inputs; a mask that became -inf would show."""
    model = model_of(kind)
    probe = onnx.ModelProto()
    probe.CopyFrom(converted(kind, "fp16", fused)["selector"])
    structure = Structure(probe)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in structure.producers.keys() - structure.outputs)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    for inputs in constructed_inputs(model.preprocessor, model.policy, model.capacity):
        for value, array in zip(session.get_outputs(), session.run(None, inputs), strict=True):
            assert array.dtype.kind != "f" or np.isfinite(array).all(), value.name


def test_a_softmax_alone_is_an_island_with_its_mask():
    model = converted("bert", "fp16", False)["selector"]
    structure, floats = Structure(model), float_tensors(model)
    alone = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert alone
    for node in alone:
        assert {node.input[0], node.output[0], *structure.producers[node.input[0]].input} <= floats


def two_layers(largest: float) -> onnx.ModelProto:
    """x -> w0 -> w1 -> logits; the first weight holds that number."""
    weights = {"w0": np.full((8, 4), largest, np.float32), "w1": np.ones((4, 2), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["a"]), helper.make_node("MatMul", ["a", "w1"], ["logits"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return name_nodes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_a_weight_that_fp16_cannot_hold_is_named_and_bf16_can():
    model = two_layers(1e6)
    guarded = guarded_nodes(model, "logits", 1)
    with pytest.raises(ExportError, match=r"'w0' holds 1e\+06, fp16 ends at 65504 .* fix: --precision bf16 or fp32"):
        to_half(model, "fp16", guarded)
    to_half(model, "bf16", guarded)


def test_a_graph_without_the_head_is_refused():
    assert len(guarded_nodes(two_layers(1.0), "logits", 2)) == 2
    with pytest.raises(ExportError, match="no head with 3 linear layers leads to 'logits'"):
        guarded_nodes(two_layers(1.0), "logits", 3)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_emulation_rounds_as_the_kernels_do(kind):
    """fp16 exists both ways on a CPU; bf16 is rounded the same way, only coarser."""
    model, heads = model_of(kind), head_layers(model_of(kind))
    emulated = {}
    for role, graph in traced(kind, True).items():
        named = name_nodes(graph)
        emulated[role] = to_half(named, "fp16", guarded_nodes(named, HEAD_OUTPUTS[role], heads[role]), emulated=True)
    pairs = (traced(kind, True), converted(kind, "fp16", True), emulated, converted(kind, "bf16", True))
    exact, *others = (answers(model, graphs, examples_of(model)[:16])["scores"] for graphs in pairs)
    kernels, stand_in, coarse = (float(np.abs(scores - exact).mean()) for scores in others)
    assert 0.3 < stand_in / kernels < 3, "the same size of error"
    assert coarse > 3 * stand_in, "three bits fewer"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_the_same_conversion_gives_the_same_bytes(precision):
    first, second = convert("bert", precision).models, conversion_of("bert", precision, True).models
    for role in first:
        one, other = (models[role].SerializeToString(deterministic=True) for models in (first, second))
        assert one == other, role


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_recurrent_layers_are_refused_where_they_have_no_kernels(precision):
    with pytest.raises(ExportError, match="fix: --precision f"):
        convert("bilstm", precision)


@pytest.mark.parametrize(
    ("counts", "precision"),
    [({"fp32": 9}, "fp32"), ({"fp16": 8, "fp32": 1}, "fp16"), ({"fp16": 8, "fp32": 2}, "mixed"),
     ({"fp16": 8, "int8": 2}, "mixed")],
)
def test_observed_precision_is_counted_not_believed(counts, precision):
    assert observed_precision(counts, 1) == precision
