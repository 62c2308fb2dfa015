"""Guarded graphs: a row that cannot be read is NaN, its neighbours are what they were, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from families import KINDS, some_images
from precisions import graph_files

from rekd_deploy.graphs.guard import guarded
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.graphs.onnx_model import check_constants, check_interface, joined
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner

VOCABULARY, WORST = 94, 2**63 - 1


@pytest.fixture(scope="module", params=["bert", "bert-zero", "vit"])
def pair(request, tmp_path_factory):
    """A model, its signature, and its graphs: as exported, guarded, and guarded in one."""
    model = KINDS[request.param]()
    signature = pair_signature(model)
    plain = {
        role: onnx.load(path)
        for role, path in graph_files(model, tmp_path_factory.mktemp(request.param)).items()
    }
    is_text = model.preprocessor.settings.kind == "text"
    safe = {
        role: guarded(graph, signature.graph(role), VOCABULARY if is_text else 0, model.preprocessor.positions)
        for role, graph in plain.items()
    }
    single = joined(safe["selector"], safe["predictor"], signature)
    return model, signature, plain, {**safe, "single": single}


def run_pair(signature, graphs, inputs):
    """The inputs with everything that selector and predictor give."""
    known = dict(inputs)
    for role in ("selector", "predictor"):
        with OnnxRuntimeRunner(graphs[role].SerializeToString(), signature.graph(role), role) as runner:
            known |= runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})
    return known


def ensemble_outputs(signature, known):
    return {spec.name: known[spec.name] for spec in signature.ensemble.outputs}


def good_inputs(model, texts):
    return dict(model.preprocessor(texts if model.preprocessor.settings.kind == "text" else some_images(3)).inputs)


def test_good_rows_stay_what_they_are_bit_for_bit(pair, texts):
    model, signature, plain, safe = pair
    inputs = good_inputs(model, texts)
    wanted, found = run_pair(signature, plain, inputs), run_pair(signature, safe, inputs)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    for role, graph in safe.items():
        check_interface(graph, signature.graph(role), role)
        check_constants(graph, role)
        onnx.checker.check_model(graph, full_check=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [*[("input_ids", value) for value in (-1, -VOCABULARY, VOCABULARY, WORST, -WORST - 1)],
     *[("attention_mask", value) for value in (-1, 2, WORST, -WORST - 1)], ("attention_mask", "empty")],
)
def test_a_row_that_cannot_be_read_is_no_number_and_harms_no_other(pair, texts, name, value):
    model, signature, plain, safe = pair
    if model.preprocessor.settings.kind == "image":
        pytest.skip("bytes can all be read")
    inputs = good_inputs(model, texts)
    wanted = ensemble_outputs(signature, run_pair(signature, plain, inputs))
    inputs[name] = inputs[name].copy()
    inputs[name][1, slice(None) if value == "empty" else 2] = 0 if value == "empty" else value
    with OnnxRuntimeRunner(safe["single"].SerializeToString(), signature.ensemble, "single") as single:
        variants = [ensemble_outputs(signature, run_pair(signature, safe, inputs)), single.run(
            {spec.name: inputs[spec.name] for spec in signature.ensemble.inputs})]
    for found in variants:
        for key, array in found.items():
            others = np.arange(len(array)) != 1
            np.testing.assert_array_equal(array[others], wanted[key][others], err_msg=key)
            assert not array[1].any() if key == "mask" else np.isnan(array[1]).all(), key


@pytest.mark.parametrize("value", [-1, 10_000, WORST])
def test_positions_that_are_none(pair, texts, value):
    model, signature, plain, safe = pair
    if "positions" not in {spec.name for spec in signature.predictor.inputs}:
        pytest.skip("this predictor reads all positions")
    known = run_pair(signature, plain, good_inputs(model, texts))
    given = {spec.name: known[spec.name].copy() for spec in signature.predictor.inputs}
    given["positions"][0, 0] = value
    with OnnxRuntimeRunner(safe["predictor"].SerializeToString(), signature.predictor, "predictor") as runner:
        found = runner.run(given)
    assert np.isnan(found["logits"][0]).all()
    np.testing.assert_array_equal(found["logits"][1:], known["logits"][1:])


@pytest.mark.parametrize("role", ["selector", "predictor", "single"])
@pytest.mark.parametrize("beyond", [0, 1, 16])
def test_texts_longer_than_the_model_reads(pair, role, beyond):
    """The networks have positions for them, but were not trained on them."""
    model, signature, plain, safe = pair
    if model.preprocessor.settings.kind == "image":
        pytest.skip("images have one size")
    inputs = {"input_ids": np.full((2, model.preprocessor.positions + beyond), 7)}
    inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    graph = signature.graph(role)
    if role == "predictor":
        inputs = run_pair(signature, plain, inputs)
    with OnnxRuntimeRunner(safe[role].SerializeToString(), graph, role) as runner:
        found = runner.run({spec.name: inputs[spec.name] for spec in graph.inputs})
    for name in {"scores", "logits", "probabilities"} & set(found):
        assert (np.isfinite(found[name]) if beyond == 0 else np.isnan(found[name])).all(), name
    assert role == "predictor" or found["mask"].any() == (beyond == 0)
