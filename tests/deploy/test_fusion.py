"""Fused graphs hold no attention in pieces, see no padding, and are the same bytes each time."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from families import KINDS, some_images

from rekd_deploy.export.graphs import export
from rekd_deploy.graphs.fusion import fused_operators, unfused_attentions
from rekd_deploy.graphs.fusion_embedding import embeddings_together
from rekd_deploy.graphs.fusion_masks import has_added_mask
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.graphs.precision.half import to_half
from rekd_deploy.graphs.precision.structure import Structure, name_nodes
from rekd_deploy.graphs.tracing import OPSET, export_graphs, traced_graphs
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_train.checkpoints.checkpoint import save

LAYERS = {"selector": 1, "predictor": 2}
WHOLE = {"Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1}
"""Of the predictor of two layers, for a CPU."""


@pytest.fixture(scope="module", params=["bert", "bert-zero", "vit", "vit-paper"])
def both(request, tmp_path_factory):
    """A model with its graphs, fused and not."""
    model = KINDS[request.param]()
    graphs = {}
    for fused in (True, False):
        folder = tmp_path_factory.mktemp(f"{request.param}-{fused}")
        graphs[fused] = export_graphs(model, folder, fused=fused)
    return request.param, model, graphs


@pytest.mark.parametrize("role", LAYERS)
def test_no_attention_is_left_in_pieces(both, role):
    kind, _, graphs = both
    plain, fused = onnx.load(graphs[False][role]), onnx.load(graphs[True][role])
    assert len(unfused_attentions(plain)) == LAYERS[role] and not fused_operators(plain)
    assert unfused_attentions(fused) == []
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
    graph = onnx.load(graphs[True][role]).graph
    assert not any(map(has_added_mask, graph.node))
    masks = {node.input[3 if node.op_type == "Attention" else 4] for node in graph.node if len(node.input) > 3 and (
        node.op_type in ("Attention", "MultiHeadAttention"))}
    assert all(name.endswith("/visible") for name in masks), "and still one, where there was one"
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert all(read & set(node.output) for node in graph.node), "what made the term is gone"


def test_fused_answers_alone_as_in_a_mixed_batch_and_as_unfused(both, texts):
    _, model, graphs = both
    items = texts if model.preprocessor.settings.kind == "text" else some_images()
    signature = pair_signature(model)
    answers = {}
    for fused, paths in graphs.items():
        with (
            OnnxRuntimeRunner(paths["selector"], signature.selector, "selector") as selector,
            OnnxRuntimeRunner(paths["predictor"], signature.predictor, "predictor") as predictor,
        ):
            def answer(given, selector=selector, predictor=predictor):
                known = dict(model.preprocessor(given).inputs)
                for runner in (selector, predictor):
                    known |= runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})
                return known

            together = answers[fused] = answer(items)
            for row, item in enumerate(items):
                alone = answer([item])
                width = alone["mask"].shape[1]
                np.testing.assert_array_equal(alone["mask"][0], together["mask"][row, :width])
                assert not together["mask"][row, width:].any() or model.policy.selectable == "all"
                np.testing.assert_allclose(alone["logits"][0], together["logits"][row], atol=2e-5)
    np.testing.assert_array_equal(answers[True]["mask"], answers[False]["mask"])
    np.testing.assert_allclose(answers[True]["logits"], answers[False]["logits"], atol=2e-5)


def test_sums_and_norms_are_one_operator_on_gpus_alone(tmp_path):
    graph = onnx.load(export_graphs(KINDS["bert"](), tmp_path, gpu=True)["predictor"])
    assert fused_operators(graph) == {
        "Attention": 2, "BiasGelu": 2, "EmbedLayerNormalization": 1, "SkipLayerNormalization": 4,
    }


def test_manifest_counts_what_was_fused_and_no_fuse_leaves_it(tmp_path, rationalizer):
    checkpoint = save(rationalizer, tmp_path / "checkpoint")
    for fused in (True, False):
        (tmp_path / str(fused)).mkdir()
        entry = export(checkpoint, tmp_path / str(fused), fused=fused).manifest["artefacts"]["predictor"]
        assert entry["fused"] == (WHOLE if fused else {})


def test_lstms_are_left_as_they_are(tmp_path):
    paths = export_graphs(KINDS["bilstm"](), tmp_path)
    assert all(fused_operators(onnx.load(path)) == {} for path in paths.values())
    assert sum(node.op_type == "LSTM" for node in onnx.load(paths["predictor"]).graph.node) == 4


def test_embeddings_of_half_precision_and_sums_of_other_things_stay_apart(rationalizer):
    graph = traced_graphs(rationalizer, fused=True, opset=OPSET)["predictor"]
    assert fused_operators(embeddings_together(graph))["EmbedLayerNormalization"] == 1
    half = to_half(graph, "fp16", Structure(name_nodes(graph)).guarded("logits", 1))
    assert "EmbedLayerNormalization" not in fused_operators(embeddings_together(half))
    together = embeddings_together(graph)
    made = {name for node in together.graph.node for name in node.output}
    read = {name for node in together.graph.node for name in node.input} | {value.name for value in graph.graph.output}
    assert made - {""} <= read, "nothing is computed that nothing reads"
