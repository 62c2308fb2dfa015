"""int8: constant scales, what is calibrated, and the rewritings that compute the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from precisions import answers, conversion_of, converted, examples_of, model_of, traced

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs import int8
from rekd_deploy.graphs import precision as convert_module
from rekd_deploy.graphs.fusion import norms_apart
from rekd_deploy.graphs.int8 import best_range, calibrated_ranges, quantised_weight, split_attention
from rekd_deploy.graphs.modules import head_layers, pair_signature
from rekd_deploy.graphs.precision import convert_pair, without_padding


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("fused", [True, False])
def test_every_scale_is_a_constant_and_weights_have_one_for_each_column(fused):
    for role, model in conversion_of("bert", "int8", fused).models.items():
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        assert not [name for name in operators(model) if name.startswith("Dynamic")]
        multiplied = 0
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert node.input[1] in constants
            if node.op_type == "MatMulIntegerToFloat":
                assert all(name in constants for name in node.input[1:] if name)
                columns = constants[node.input[1]].dims[1]
                assert list(constants[node.input[3]].dims) == [columns]
                multiplied += 1
        assert multiplied == (({"selector": 6, "predictor": 12}[role]) if fused else 0)
        assert operators(model).count("DequantizeLinear") == (0 if fused else operators(model).count("QuantizeLinear")
                                                              + {"selector": 6, "predictor": 12}[role])


def test_the_served_form_holds_the_fast_operators_alone():
    for model in conversion_of("bert", "int8").models.values():
        assert not {"SkipLayerNormalization", "Attention", "BiasGelu"} & set(operators(model))
        assert {"MultiHeadAttention", "LayerNormalization", "Gelu"} <= set(operators(model))


def test_both_forms_round_alike(texts):
    model = model_of("bert")
    fused, plain = (answers(model, converted("bert", "int8", form), [texts])[0] for form in (True, False))
    np.testing.assert_allclose(fused["logits"], plain["logits"], atol=2e-2)
    np.testing.assert_array_equal(fused["mask"], plain["mask"])


def test_int8_is_not_float32(texts):
    both = (traced("bert", True), converted("bert", "int8"))
    exact, rounded = (answers(model_of("bert"), graphs, [texts])[0]["logits"] for graphs in both)
    assert 1e-5 < np.abs(exact - rounded).max() < 0.5


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_attention_and_norms_taken_apart_compute_the_same(kind, texts):
    model = model_of(kind)
    items = texts if kind == "bert" else examples_of(model)[:5]
    apart = {role: norms_apart(split_attention(graph)) for role, graph in traced(kind, True).items()}
    for graph in apart.values():
        assert not {"SkipLayerNormalization", "Attention"} & set(operators(graph))
        onnx.checker.check_model(graph, full_check=True)
    before, after = (answers(model, graphs, [items])[0] for graphs in (traced(kind, True), apart))
    for name in ("scores", "logits"):
        np.testing.assert_allclose(before[name], after[name], atol=5e-5)
    np.testing.assert_array_equal(before["mask"], after["mask"])


def test_onnx_runtime_leaves_the_norms_apart(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 4
    model = norms_apart(traced("bert", True)["selector"])
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert "SkipLayerNormalization" not in operators(onnx.load(tmp_path / "optimised.onnx"))


def test_weights_are_rounded_by_column():
    weight = np.array([[1.0, 100.0, 0.0], [-0.5, 50.0, 0.0]], np.float32)
    integers, scales = quantised_weight(weight)
    assert integers.dtype == np.int8 and integers[:, 0].tolist() == [127, -64] and integers[:, 1].tolist() == [85, 42]
    np.testing.assert_allclose(integers * scales, weight, atol=0.5)
    assert np.abs((integers * scales - weight)[:, 0]).max() < 0.005, "the large column takes nothing from the small one"


def test_ranges_hold_zero_and_leave_out_what_stands_alone():
    values = np.concatenate([np.linspace(-1, 3, 100_000), [12.0]]).astype(np.float32)
    found = best_range(values)
    assert found.scale * 255 < 12.5 and found.scale * (255 - int(found.zero_point)) > 3
    assert best_range(np.linspace(2, 3, 10, dtype=np.float32)).zero_point == 0
    assert best_range(np.linspace(-3, -2, 10, dtype=np.float32)).zero_point == 255
    assert best_range(np.zeros(4, np.float32)).scale > 0


def test_padding_is_not_calibrated_on():
    inputs = {"input_ids": np.array([[2, 7, 3, 0, 0]]), "attention_mask": np.array([[1, 1, 1, 0, 0]])}
    assert {name: array.tolist() for name, array in without_padding(inputs).items()} == {
        "input_ids": [[2, 7, 3]], "attention_mask": [[1, 1, 1]],
    }
    model = model_of("bert")
    graph = traced("bert", True)["selector"]
    tensor = next(node.input[0] for node in graph.graph.node if node.op_type == "MatMul")
    short = dict(model.preprocessor(["bad"]).inputs)
    padded, cut = (calibrated_ranges(graph, [tensor], [batch])[tensor] for batch in (short, without_padding(short)))
    assert padded != cut


def test_a_selector_that_rounding_ruins_is_kept_in_float32(monkeypatch, texts):
    """Weights far from what they were: the rationales change, and the selector stays as it was."""
    monkeypatch.setattr(int8, "quantised_weight", lambda values: quantised_weight(-20 * values))
    model = model_of("bert")
    graphs = traced("bert", True)
    heads = head_layers(model)
    conversion = convert_pair(
        graphs, "int8", pair_signature(model), heads, model.preprocessor, examples_of(model)[:20], fused=True
    )
    assert conversion.precisions == {"selector": "fp32", "predictor": "int8"}
    assert conversion.notes["selector"].startswith("fp32, since in int8 ")
    ours, theirs = (answers(model, {**graphs, "selector": selector}, [texts])[0]["scores"]
                    for selector in (graphs["selector"], conversion.models["selector"]))
    np.testing.assert_array_equal(ours, theirs)


def test_nothing_to_calibrate_on_is_said():
    model = model_of("bert")
    with pytest.raises(ExportError, match="int8 needs examples to calibrate on; fix: --parity-texts"):
        convert_pair(
            traced("bert", True), "int8", pair_signature(model), head_layers(model), model.preprocessor, [], fused=True
        )


def test_calibration_takes_a_part_of_the_examples(monkeypatch):
    seen = []

    def calibrate(model, guarded, batches, *, fused):
        seen.append(len(list(batches)))
        return model

    monkeypatch.setattr(convert_module, "to_int8", calibrate)
    model = model_of("bert")
    conversion = convert_pair(
        traced("bert", True), "int8", pair_signature(model), head_layers(model), model.preprocessor,
        (examples_of(model) * 4)[:200], fused=True,
    )
    assert seen == [50, 50] and not conversion.notes


def test_calibrated_scales_are_stored_as_float32():
    scales = [t for t in converted("bert", "int8")["predictor"].graph.initializer if t.name.endswith("/scale")]
    assert scales and all(numpy_helper.to_array(tensor).dtype == np.float32 for tensor in scales)
