"""Fused graphs hold no attention in pieces, see no padding, and are the same bytes each time."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from families import some_images
from precisions import answers, assert_no_neighbours, graph_files, model_of, traced

from rekd_deploy.export.graphs import export
from rekd_deploy.graphs.fusion import embeddings_together, fused_operators, has_added_mask
from rekd_deploy.graphs.half import to_half
from rekd_deploy.graphs.precision import guarded_nodes, name_nodes
from rekd_train.checkpoints.checkpoint import save

LAYERS = {"selector": 1, "predictor": 2}
WHOLE = {"Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1}
"""Of the predictor of two layers, for a CPU."""


@pytest.fixture(scope="module", params=["bert", "bert-zero", "vit", "vit-paper"])
def both(request, tmp_path_factory):
    """A model with its graphs as they are written, fused and not."""
    model, graphs = model_of(request.param), {}
    for fused in (True, False):
        files = graph_files(model, tmp_path_factory.mktemp(f"{request.param}-{fused}"), fused=fused)
        graphs[fused] = {role: onnx.load(path) for role, path in files.items()}
    return request.param, model, graphs


@pytest.mark.parametrize("role", LAYERS)
def test_no_attention_is_left_in_pieces(both, role):
    kind, _, graphs = both
    plain, fused = graphs[False][role], graphs[True][role]
    alone, apart = (sum(node.op_type == "Softmax" for node in graph.graph.node) for graph in (fused, plain))
    assert apart - alone == LAYERS[role] and alone == (role == "predictor"), "the probabilities' own"
    assert not fused_operators(plain)
    operators = fused_operators(fused)
    assert operators.get("Attention", 0) + operators.get("MultiHeadAttention", 0) == LAYERS[role]
    assert operators["BiasGelu"] == LAYERS[role] and "SkipLayerNormalization" not in operators
    # a predictor that blanks multiplies the words before they are added up
    embeddings = {
        ("bert", "selector"): 1, ("bert", "predictor"): 1, ("bert-zero", "selector"): 1,
    }
    assert operators.get("EmbedLayerNormalization", 0) == embeddings.get((kind, role), 0)
    assert fused.ir_version <= 10 and not any(node.op_type == "IsNaN" for node in fused.graph.node)


@pytest.mark.parametrize("role", LAYERS)
def test_attention_takes_the_mask_that_every_version_of_the_runtime_takes(both, role):
    """A term for all heads at once: ONNX Runtime 1.19 loads it and fails at the first request."""
    _, _, graphs = both
    graph = graphs[True][role].graph
    assert not any(map(has_added_mask, graph.node))
    masks = {node.input[3 if node.op_type == "Attention" else 4] for node in graph.node if len(node.input) > 3 and (
        node.op_type in ("Attention", "MultiHeadAttention"))}
    assert all(name.endswith("/visible") for name in masks), "and still one, where there was one"
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert all(read & set(node.output) for node in graph.node), "what made the term is gone"


def test_fused_predicts_as_unfused_and_alone_as_in_a_mixed_batch(both, texts):
    _, model, graphs = both
    items = texts if model.preprocessor.settings.kind == "text" else some_images()
    for pair in graphs.values():
        assert_no_neighbours(model, pair, texts)
    fused, plain = (answers(model, graphs[each], [items])[0] for each in (True, False))
    np.testing.assert_array_equal(fused["mask"], plain["mask"])
    np.testing.assert_allclose(fused["logits"], plain["logits"], atol=2e-5)


def test_sums_and_norms_are_one_operator_on_gpus_alone(tmp_path):
    graph = onnx.load(graph_files(model_of("bert"), tmp_path, gpu=True)["predictor"])
    assert fused_operators(graph) == {
        "Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1, "SkipLayerNormalization": 4,
    }


def test_manifest_counts_what_was_fused_and_no_fuse_leaves_it(tmp_path, rationalizer):
    checkpoint = save(rationalizer, tmp_path / "checkpoint")
    for fused in (True, False):
        (tmp_path / str(fused)).mkdir()
        entry = export(checkpoint, tmp_path / str(fused), fused=fused).manifest["artefacts"]["predictor"]
        assert entry["fused"] == (WHOLE if fused else {})


def test_lstms_are_left_as_they_are():
    graphs = traced("bilstm", True)
    assert not any(map(fused_operators, graphs.values()))
    assert sum(node.op_type == "LSTM" for node in graphs["predictor"].graph.node) == 4


def test_embeddings_of_half_precision_and_sums_of_other_things_stay_apart():
    graph = name_nodes(traced("bert", True)["predictor"])
    together = embeddings_together(graph)
    assert fused_operators(together)["EmbedLayerNormalization"] == 1
    half = to_half(graph, "fp16", guarded_nodes(graph, "logits", 1))
    assert "EmbedLayerNormalization" not in fused_operators(embeddings_together(half))
    made = {name for node in together.graph.node for name in node.output}
    read = {name for node in together.graph.node for name in node.input} | {value.name for value in graph.graph.output}
    assert made - {""} <= read, "nothing is computed that nothing reads"
