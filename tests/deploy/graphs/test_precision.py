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
from rekd_deploy.graphs.precision import (
    HEAD_OUTPUTS,
    guarded_nodes,
    multiplications,
    name_nodes,
    observed_precision,
)
from rekd_deploy.parity.examples import constructed_inputs

CASES = [
    (kind, precision, fused)
    for kind, fused in (("bert", True), ("bert", False), ("bert-zero", True), ("vit", True), ("bilstm", True))
    for precision in (("fp32", "fp16") if kind == "bilstm" else ("fp32", "fp16", "bf16", "int8"))
]
HALVES = [case for case in CASES if case[1] in ("fp16", "bf16")]


@pytest.mark.parametrize(("kind", "precision", "fused"), CASES)
def test_an_answer_has_no_neighbours(kind, precision, fused, texts):
    assert_no_neighbours(model_of(kind), converted(kind, precision, fused), texts)


def test_int8_that_scales_by_the_batch_does_have_neighbours(texts, tmp_path):
    """What the check is for: quantize_dynamic, which takes a scale from all rows of a batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graphs = dict(traced("bert", False))
    onnx.save(graphs["predictor"], tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", weight_type=QuantType.QInt8)
    graphs["predictor"] = onnx.load(tmp_path / "dynamic.onnx")
    with pytest.raises(AssertionError):
        assert_no_neighbours(model_of("bert"), graphs, texts)


@pytest.mark.parametrize(("kind", "precision", "fused"), [case for case in CASES if case[1] != "fp32"])
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
    conversion = conversion_of("vit", "int8")
    assert conversion.precisions == {"selector": "fp32", "predictor": "int8"}
    assert "8 of 768 real positions are flipped, 1.04% (limit 0.50%)" in conversion.notes["selector"]
    assert conversion_of("bert", "int8").precisions == {"selector": "int8", "predictor": "int8"}


@pytest.mark.parametrize(("kind", "precision", "fused"), [case for case in CASES if case[1] != "fp32"])
def test_head_and_decision_stay_as_they_are(kind, precision, fused):
    """Node by node and constant by constant, from the head's first layer to the last output."""
    model = model_of(kind)
    for role, after in converted(kind, precision, fused).items():
        before, after = name_nodes(traced(kind, fused)[role]), name_nodes(after)
        guarded = guarded_nodes(before, HEAD_OUTPUTS[role], head_layers(model)[role])
        assert len(guarded) > (10 if role == "selector" else 1)
        old, new = ({node.name: node for node in graph.graph.node} for graph in (before, after))
        constants = [{t.name: t for t in graph.graph.initializer} for graph in (before, after)]
        for name in guarded:
            assert (old[name].op_type, old[name].attribute) == (new[name].op_type, new[name].attribute)
            for first, second in zip(old[name].input, new[name].input, strict=True):
                if first in constants[0]:
                    assert first == second and constants[0][first] == constants[1][second]
        added = guarded_nodes(after, HEAD_OUTPUTS[role], head_layers(model)[role]) - guarded
        assert not {new[name].op_type for name in added} - {"Cast"}, "nothing was put between scores and outputs"


@pytest.mark.parametrize(("kind", "precision", "fused"), HALVES)
def test_half_precision_holds_no_constant_beyond_it_and_the_decision_keeps_its_own(kind, precision, fused):
    for role, model in conversion_of(kind, precision, fused).models.items():
        halves = 0
        for tensor in model.graph.initializer:
            if tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
                values = numpy_helper.to_array(tensor).astype(np.float32)
                assert np.isfinite(values).all() and (values >= MASKED * 1.01).all()
                halves += 1
        assert halves > 5
        if role == "selector":
            lowest = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 0
                      and numpy_helper.to_array(t) == np.finfo(np.float32).min]
            assert lowest, "unselectable positions still rank below every score"


@pytest.mark.parametrize(("kind", "fused"), [("bert", True), ("bert", False), ("bert-zero", True), ("vit", True)])
def test_nothing_overflows_in_half_precision(kind, fused):
    """Every tensor in between, on padded, shortest and longest inputs; a mask that became -inf would show."""
    model = model_of(kind)
    selector = converted(kind, "fp16", fused)["selector"]
    probe = onnx.ModelProto()
    probe.CopyFrom(selector)
    produced = [name for node in selector.graph.node for name in node.output if name]
    known = {value.name for value in selector.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in produced if name not in known)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    for inputs in constructed_inputs(model.preprocessor, model.policy, model.capacity):
        for name, values in zip([v.name for v in session.get_outputs()], session.run(None, inputs), strict=True):
            if values.dtype.kind == "f":
                assert np.isfinite(values).all(), name


def layer_norm_graph(scale: float) -> onnx.ModelProto:
    """(x W0) -> layer norm -> W1, with activations as large as ``scale``."""
    generator = np.random.default_rng(0)
    weights = {
        "w0": generator.normal(size=(8, 16)) * scale, "w1": generator.normal(size=(16, 4)),
        "w2": np.ones((4, 2)), "g": np.ones(16), "b": np.zeros(16),
    }
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "w0"], ["a"]),
                helper.make_node("LayerNormalization", ["a", "g", "b"], ["n"], epsilon=1e-12, stash_type=1),
                helper.make_node("MatMul", ["n", "w1"], ["c"]),
                helper.make_node("MatMul", ["c", "w2"], ["logits"]),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
            [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_squares_inside_a_layer_norm_do_not_overflow(precision):
    """Activations near 1000: their squares are beyond half precision, their norm is not."""
    model = name_nodes(layer_norm_graph(400.0))
    half = to_half(model, precision, guarded_nodes(model, "logits", 1), emulated=precision == "bf16")
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    before, after = (
        onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for graph in (model, half)
    )
    np.testing.assert_allclose(before[0], after[0], rtol=0.05, atol=0.15)
    assert np.abs(x @ numpy_helper.to_array(model.graph.initializer[0])).max() > 300


def test_a_softmax_alone_is_an_island_with_its_mask():
    model = converted("bert", "fp16", False)["selector"]
    structure = Structure(model)
    floats = float_tensors(model)
    alone = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert alone
    for node in alone:
        assert node.input[0] in floats and node.output[0] in floats
        assert set(structure.producers[node.input[0]].input) <= floats


def test_a_weight_that_fp16_cannot_hold_is_named_and_bf16_can():
    model = name_nodes(layer_norm_graph(1e6))
    guarded = guarded_nodes(model, "logits", 1)
    with pytest.raises(ExportError, match=r"'w0' holds .*, fp16 ends at 65504 .* fix: --precision bf16 or fp32"):
        to_half(model, "fp16", guarded)
    to_half(model, "bf16", guarded)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_emulation_rounds_as_the_kernels_do(kind, texts):
    """fp16 exists both ways on a CPU; bf16 is rounded the same way, only coarser."""
    model = model_of(kind)
    items = examples_of(model)[:16]
    guarded = {
        role: guarded_nodes(name_nodes(graph), HEAD_OUTPUTS[role], head_layers(model)[role])
        for role, graph in traced(kind, True).items()
    }
    stand_in = {
        role: to_half(graph, "fp16", guarded[role], emulated=True) for role, graph in traced(kind, True).items()
    }
    exact, real, emulated, coarse = (
        answers(model, graphs, [items])[0]["scores"]
        for graphs in (traced(kind, True), converted(kind, "fp16"), stand_in, converted(kind, "bf16"))
    )
    errors = [float(np.abs(scores - exact).mean()) for scores in (real, emulated, coarse)]
    assert 0.3 < errors[1] / errors[0] < 3, "the same size of error"
    assert errors[2] > 3 * errors[1], "three bits fewer"


def test_the_same_conversion_gives_the_same_bytes():
    for precision in ("fp16", "bf16", "int8"):
        first, second = (convert("bert", precision).models for _ in range(2))
        for role in first:
            one, other = (models[role].SerializeToString(deterministic=True) for models in (first, second))
            assert one == other, (precision, role)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_recurrent_layers_are_refused_where_they_have_no_kernels(precision):
    with pytest.raises(ExportError, match="fix: --precision f"):
        convert("bilstm", precision)


def test_a_graph_without_the_head_is_refused():
    graph = name_nodes(layer_norm_graph(1.0))
    assert len(guarded_nodes(graph, "logits", 2)) == 2
    with pytest.raises(ExportError, match="no head with 4 linear layers leads to 'logits'"):
        guarded_nodes(graph, "logits", 4)


def test_observed_precision_is_counted_not_believed():
    assert observed_precision({"fp32": 9}, 1) == "fp32"
    assert observed_precision({"fp16": 8, "fp32": 1}, 1) == "fp16"
    assert observed_precision({"fp16": 8, "fp32": 2}, 1) == "mixed"
    assert observed_precision({"fp16": 8, "int8": 2}, 1) == "mixed"
