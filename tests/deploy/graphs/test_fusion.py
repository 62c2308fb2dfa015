"""Fused graphs hold no attention in pieces, see no padding, and say what was fused."""

import numpy as np
import onnx
import pytest
from families import some_images
from precisions import answers, graph_files, model_of, traced

from rekd_deploy.graphs.fusion import embeddings_together, fused_operators, has_added_mask
from rekd_deploy.graphs.half import to_half
from rekd_deploy.graphs.precision import guarded_nodes, name_nodes

pytestmark = pytest.mark.slow

LAYERS = {"selector": 1, "predictor": 2}
EMBEDDED = {("bert", "selector"), ("bert", "predictor"), ("bert-zero", "selector")}
"""A predictor that blanks multiplies the words before they are added up."""


@pytest.fixture(scope="module", params=["bert", "bert-zero", "vit", "vit-paper"])
def both(request, tmp_path_factory):
    """A model with its graphs as they are written, fused and not."""
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


def test_sums_and_norms_are_one_operator_on_gpus_alone_and_lstms_stay_apart(tmp_path, artefacts):
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
