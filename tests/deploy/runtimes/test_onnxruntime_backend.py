"""The repository for Triton's onnxruntime backend, loaded by that backend's own rules, and what it answers."""

from __future__ import annotations

import numpy as np
import pytest
from families import KINDS, some_images
from onnxruntime_backend import Server

from rekd_deploy.export.run import publish
from rekd_deploy.repository.config import SINGLE
from rekd_train.checkpoints.checkpoint import save


@pytest.fixture(scope="module", params=["bert", "vit"])
def loaded(request, tmp_path_factory):
    """A model, and the backend on its repository."""
    folder = tmp_path_factory.mktemp(request.param)
    model = KINDS[request.param]()
    root = folder / "repository"
    publish(save(model, folder / "checkpoint"), root, target="onnxruntime", single_graph=True, gpu=False)
    return model, Server(root)


def items(model, texts):
    return texts if model.preprocessor.settings.kind == "text" else some_images(5)


def test_the_ensemble_answers_what_the_model_answers(loaded, texts):
    model, server = loaded
    encoded = model.preprocessor(items(model, texts))
    found = server.infer("rekd", dict(encoded.inputs))
    whole = server.models[SINGLE].run(dict(encoded.inputs))
    assert found.keys() == whole.keys() == {"scores", "mask", "logits", "probabilities"}
    for answers in (found, whole):
        read = encoded.predictions(model.labels, answers["probabilities"], answers["mask"], answers["scores"])
        for one, other in zip(read, model.predict(items(model, texts)), strict=True):
            assert (one.label, one.rate) == (other.label, other.rate)
            np.testing.assert_allclose([*one.probabilities.values()], [*other.probabilities.values()], atol=1e-4)


def test_requests_of_one_shape_may_be_joined_and_a_bad_one_harms_no_other(loaded, texts):
    model, server = loaded
    inputs = dict(model.preprocessor(items(model, texts)).inputs)
    alone = [server.infer("rekd", {name: array[row : row + 1] for name, array in inputs.items()}) for row in range(5)]
    together = server.infer("rekd", inputs)
    for row, answer in enumerate(alone):
        for name, array in answer.items():
            np.testing.assert_allclose(together[name][row], array[0], atol=2e-5, err_msg=name)
    if "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"].copy()
        inputs["input_ids"][2, 1] = -1
        found = server.infer("rekd", inputs)
        assert np.isnan(found["probabilities"][2]).all() and np.isnan(found["scores"][2]).all()
        for row in (0, 1, 3, 4):
            np.testing.assert_array_equal(found["probabilities"][row], together["probabilities"][row])
