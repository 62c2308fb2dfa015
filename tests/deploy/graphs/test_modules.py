"""What stands in every graph: the decision as specified, a guard against inputs that cannot be read, what is fused."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
import torch
from conftest import make_rationalizer
from families import some_images
from precisions import answers, graph_files, model_of, run_pair, traced
from torch import nn

from rekd_deploy.contract.signature import BATCH, LENGTH, GraphSignature, TensorSpec
from rekd_deploy.export.graphs import guarded_pair
from rekd_deploy.graphs.fusion import embeddings_together, fused_operators, has_added_mask
from rekd_deploy.graphs.half import to_half
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.graphs.onnx_model import joined
from rekd_deploy.graphs.precision import guarded_nodes, name_nodes
from rekd_deploy.graphs.tracing import onnx_from_module
from rekd_deploy.parity.examples import constructed_scores
from rekd_deploy.parity.gate import wrong_handovers
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, mask_by_specification
from rekd_train.models.base import apply_policy, kept_positions

pytestmark = pytest.mark.slow

POLICIES = {"threshold, budget, minimum": SelectionPolicy(bias=0.1, budget=0.25, minimum=1),
            "fill the budget": SelectionPolicy(bias=None, budget=0.3, minimum=0),
            "threshold alone": SelectionPolicy(bias=-0.5, budget=None, minimum=0),
            "minimum above budget": SelectionPolicy(bias=-5.0, budget=0.05, minimum=4), "paper": PAPER_POLICY}


def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_every_position_has_a_slot_budgets_are_integers_and_norms_one_operator_on_gpus(tmp_path, artefacts):
    rationalizer = make_rationalizer(policy=PAPER_POLICY)
    special = rationalizer.preprocessor.special_ids
    inputs = tensors(rationalizer.preprocessor.pad([[special["cls"], *range(10, 56), special["sep"]]], 48))
    everything = torch.ones(1, 48, dtype=torch.bool)
    with torch.inference_mode():
        logits = rationalizer.gathered_class_logits(inputs, everything)
        expected = rationalizer.class_logits(inputs, everything)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    policy = SelectionPolicy(bias=None, budget=0.902439, minimum=0)
    with decide_in_onnx(policy, 41) as decision:
        chosen = decision.run({"scores": np.zeros((1, 41), np.float32), "selectable": np.ones((1, 41), bool)})
    assert chosen["mask"].sum() == policy.limits(np.array([41]))[0] == 36
    counted = artefacts.manifest["artefacts"]["predictor"]["fused"]
    assert counted == {"Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1}
    graph = onnx.load(graph_files(model_of("bert"), tmp_path, gpu=True)["predictor"])
    assert fused_operators(graph) == counted | {"SkipLayerNormalization": 4}
    graphs = traced("bilstm", True)
    assert not any(map(fused_operators, graphs.values()))
    assert sum(node.op_type == "LSTM" for node in graphs["predictor"].graph.node) == 4
    graph = name_nodes(traced("bert", True)["predictor"])
    half = to_half(graph, "fp16", guarded_nodes(graph, "logits", 1))
    assert "EmbedLayerNormalization" not in fused_operators(embeddings_together(half))


class _Decision(nn.Module):
    def __init__(self, policy: SelectionPolicy, capacity: int) -> None:
        super().__init__()
        self.policy, self.capacity = policy, capacity

    def forward(self, *tensors):
        mask = apply_policy(*tensors, self.policy, self.capacity)
        return mask, *kept_positions(mask, self.capacity)


def decide_in_onnx(policy: SelectionPolicy, capacity: int):
    """The decision exported on its own, as a function of scores and selectable positions."""
    text, slots = (BATCH, LENGTH), (BATCH, capacity)
    signature = GraphSignature(
        (TensorSpec("scores", "float32", text), TensorSpec("selectable", "bool", text)),
        (TensorSpec("mask", "bool", text), TensorSpec("positions", "int64", slots), TensorSpec("kept", "bool", slots)),
    )
    model = onnx_from_module(_Decision(policy, capacity), signature, "decision", longest=64)
    return OnnxRuntimeRunner(model.SerializeToString(), signature, "decision")


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_exported_decision_is_the_specification_on_ties_and_steps(policy):
    rationalizer = make_rationalizer(policy=policy)
    with decide_in_onnx(policy, rationalizer.capacity) as decision:
        for arrays in constructed_scores(rationalizer.preprocessor, policy, rationalizer.capacity):
            selectable = rationalizer.selectable(tensors(arrays)).numpy()
            chosen = decision.run({"scores": arrays["scores"], "selectable": selectable})
            np.testing.assert_array_equal(chosen["mask"], mask_by_specification(arrays["scores"], selectable, policy))
            assert not wrong_handovers(chosen)


VOCABULARY, WORST = 94, 2**63 - 1
every_text_pair = pytest.mark.parametrize("kind", ["bert", "bert-zero"])


@cache
def guarded_as(kind):
    model = model_of(kind)
    signature = pair_signature(model)
    with TemporaryDirectory() as folder:
        plain = {role: onnx.load(path) for role, path in graph_files(model, Path(folder)).items()}
    safe = guarded_pair(plain, model, signature)
    return model, signature, plain, {**safe, "single": joined(safe["selector"], safe["predictor"], signature)}


def run(graph, signature, known):
    with OnnxRuntimeRunner(graph.SerializeToString(), signature, "graph") as runner:
        return runner.run({spec.name: known[spec.name] for spec in signature.inputs})


def good_inputs(model, texts):
    return dict(model.preprocessor(texts if model.preprocessor.settings.kind == "text" else some_images(3)).inputs)


@pytest.mark.parametrize("kind", ["bert", "bert-zero", "vit"])
def test_good_rows_stay_what_they_are_bit_for_bit(kind, texts):
    model, signature, plain, safe = guarded_as(kind)
    wanted, found = (run_pair(signature, graphs, good_inputs(model, texts)) for graphs in (plain, safe))
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@every_text_pair
@pytest.mark.parametrize(("name", "value"), [
    *(("input_ids", value) for value in (-1, -VOCABULARY, VOCABULARY, WORST, -WORST - 1)),
    *(("attention_mask", value) for value in (-1, 2, WORST, -WORST - 1, "empty"))])
def test_a_row_that_cannot_be_read_is_no_number_and_harms_no_other(kind, texts, name, value):
    model, signature, plain, safe = guarded_as(kind)
    inputs = good_inputs(model, texts)
    wanted = run_pair(signature, plain, inputs)
    inputs[name] = inputs[name].copy()
    inputs[name][1, slice(None) if value == "empty" else 2] = 0 if value == "empty" else value
    for found in (run_pair(signature, safe, inputs), run(safe["single"], signature.ensemble, inputs)):
        for key in (spec.name for spec in signature.ensemble.outputs):
            others = np.arange(len(wanted[key])) != 1
            np.testing.assert_array_equal(found[key][others], wanted[key][others], err_msg=key)
            assert not found[key][1].any() if key == "mask" else np.isnan(found[key][1]).all(), key


@pytest.mark.parametrize("value", [-1, 10_000, WORST])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_positions_that_are_none(kind, value, texts):
    model, signature, plain, safe = guarded_as(kind)
    known = run_pair(signature, plain, good_inputs(model, texts))
    changed = known["positions"].copy()
    changed[0, 0] = value
    found = run(safe["predictor"], signature.predictor, known | {"positions": changed})
    assert np.isnan(found["logits"][0]).all()
    np.testing.assert_array_equal(found["logits"][1:], known["logits"][1:])


@every_text_pair
@pytest.mark.parametrize("role", ["selector", "predictor", "single"])
@pytest.mark.parametrize("beyond", [0, 1, 16])
def test_texts_longer_than_the_model_reads(kind, role, beyond):
    """The networks have positions for them, but were not trained on them."""
    model, signature, plain, safe = guarded_as(kind)
    inputs = {"input_ids": np.full((2, model.preprocessor.positions + beyond), 7)}
    inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    found = run(safe[role], signature.graph(role), run_pair(signature, plain, inputs))
    for name in {"scores", "logits", "probabilities"} & set(found):
        assert (np.isfinite(found[name]) if beyond == 0 else np.isnan(found[name])).all(), name
    assert role == "predictor" or found["mask"].any() == (beyond == 0)


LAYERS = {"selector": 1, "predictor": 2}
EMBEDDED = {("bert", "selector"), ("bert", "predictor"), ("bert-zero", "selector")}
"""A predictor that blanks multiplies the words before they are added up."""


@pytest.fixture(scope="module", params=["bert", "bert-zero", "vit", "vit-paper"])
def both(request, tmp_path_factory):
    model, graphs = model_of(request.param), {}
    for fused in (True, False):
        files = graph_files(model, tmp_path_factory.mktemp(f"{request.param}-{fused}"), fused=fused)
        graphs[fused] = {role: onnx.load(path) for role, path in files.items()}
    return request.param, model, graphs


@pytest.mark.parametrize("role", LAYERS)
def test_no_attention_is_left_in_pieces_nor_anything_that_nothing_reads(both, role):
    kind, _, graphs = both
    plain, fused = graphs[False][role], graphs[True][role]
    alone, apart = (sum(node.op_type == "Softmax" for node in graph.graph.node) for graph in (fused, plain))
    assert apart - alone == LAYERS[role] and alone == (role == "predictor"), "the probabilities' own"
    operators = fused_operators(fused)
    assert operators.get("Attention", 0) + operators.get("MultiHeadAttention", 0) == LAYERS[role]
    assert operators["BiasGelu"] == LAYERS[role] and "SkipLayerNormalization" not in operators
    assert operators.get("EmbedLayerNormalization", 0) == ((kind, role) in EMBEDDED) and not fused_operators(plain)
    nodes = fused.graph.node
    assert fused.ir_version <= 10 and not any(node.op_type == "IsNaN" for node in nodes)
    read = {name for node in nodes for name in node.input} | {value.name for value in fused.graph.output}
    assert all(read & set(node.output) for node in nodes)
    # a term for all heads at once: ONNX Runtime 1.19 loads it and fails at the first request
    assert not any(map(has_added_mask, nodes))
    inputs = {"Attention": 3, "MultiHeadAttention": 4}
    masks = {name for node in nodes for name in node.input[inputs.get(node.op_type, 9) :][:1]}
    assert all(name.endswith("/visible") for name in masks), "and still one, where there was one"


def test_fused_predicts_as_unfused(both, texts):
    _, model, graphs = both
    items = texts if model.preprocessor.settings.kind == "text" else some_images()
    fused, plain = (answers(model, graphs[each], items) for each in (True, False))
    np.testing.assert_array_equal(fused["mask"], plain["mask"])
    np.testing.assert_allclose(fused["logits"], plain["logits"], atol=2e-5)
