"""Guarded graphs: a row that cannot be read is NaN, its neighbours are what they were, bit for bit."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
from families import some_images
from precisions import graph_files, model_of, run_pair

from rekd_deploy.export.graphs import guarded_pair
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.graphs.onnx_model import joined
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner

pytestmark = pytest.mark.slow

VOCABULARY, WORST = 94, 2**63 - 1
every_text_pair = pytest.mark.parametrize("kind", ["bert", "bert-zero"])


@cache
def guarded_as(kind):
    """A model, its signature, and its graphs: as exported, guarded, and guarded in one."""
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
    *(("attention_mask", value) for value in (-1, 2, WORST, -WORST - 1, "empty")),
])
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
