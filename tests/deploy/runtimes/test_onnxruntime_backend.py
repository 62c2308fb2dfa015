"""The repository for Triton's onnxruntime backend, loaded by that backend's own rules, and what it answers."""

from __future__ import annotations

import numpy as np
import pytest
from families import KINDS, some_images
from onnxruntime_backend import LoadError, Server

from rekd_deploy.export.run import publish
from rekd_deploy.repository.config import SELECTOR, SINGLE
from rekd_train.checkpoints.checkpoint import save


@pytest.fixture(scope="module", params=["bert", "vit"])
def loaded(request, tmp_path_factory):
    """A model, its repository, and the backend on it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = KINDS[request.param]()
    root = folder / "repository"
    publish(save(model, folder / "checkpoint"), root, target="onnxruntime", single_graph=True, gpu=False)
    return model, root, Server(root)


def items(model, texts):
    return texts if model.preprocessor.settings.kind == "text" else some_images(5)


def test_the_ensemble_answers_what_the_model_answers(loaded, texts):
    model, _, server = loaded
    encoded = model.preprocessor(items(model, texts))
    found = server.ask("rekd", dict(encoded.inputs))
    whole = server.models[SINGLE].run(dict(encoded.inputs))
    assert found.keys() == whole.keys() == {"scores", "mask", "logits", "probabilities"}
    for answers in (found, whole):
        read = encoded.predictions(model.labels, answers["probabilities"], answers["mask"], answers["scores"])
        for one, other in zip(read, model.predict(items(model, texts)), strict=True):
            assert (one.label, one.rate) == (other.label, other.rate)
            np.testing.assert_allclose([*one.probabilities.values()], [*other.probabilities.values()], atol=1e-4)


def test_requests_of_one_shape_may_be_joined_and_a_bad_one_harms_no_other(loaded, texts):
    model, _, server = loaded
    inputs = dict(model.preprocessor(items(model, texts)).inputs)
    alone = [server.ask("rekd", {name: array[row : row + 1] for name, array in inputs.items()}) for row in range(5)]
    together = server.ask("rekd", inputs)
    for row, answer in enumerate(alone):
        for name, array in answer.items():
            np.testing.assert_allclose(together[name][row], array[0], atol=2e-5, err_msg=name)
    if "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"].copy()
        inputs["input_ids"][2, 1] = -1
        found = server.ask("rekd", inputs)
        assert np.isnan(found["probabilities"][2]).all() and np.isnan(found["scores"][2]).all()
        for row in (0, 1, 3, 4):
            np.testing.assert_array_equal(found["probabilities"][row], together["probabilities"][row])


@pytest.mark.parametrize(
    ("old", "new"),
    [("data_type: TYPE_BOOL", "data_type: TYPE_UINT8"), ("max_batch_size", "max_batch"), ('name: "mask"', 'name: "x"')],
)
def test_the_stand_in_refuses_what_the_backend_refuses(loaded, tmp_path, old, new):
    import shutil

    from google.protobuf.text_format import ParseError

    _, root, _ = loaded
    copy = shutil.copytree(root, tmp_path / "copy")
    path = copy / SELECTOR / "config.pbtxt"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises((LoadError, ParseError)):
        Server(copy)


def test_a_warm_up_of_impossible_ids_would_fail(loaded, tmp_path):
    """What the files under warmup/ are for: they are run, and a wrong size is no warm-up."""
    import shutil

    _, root, _ = loaded
    copy = shutil.copytree(root, tmp_path / "copy")
    path = sorted((copy / SELECTOR / "warmup").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError):
        Server(copy)
