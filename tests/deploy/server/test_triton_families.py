"""The real Triton on images and on a predictor that blanks: subsets of answers, both steps, the single graph."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
from families import KINDS, assert_same_answers, some_images
from test_triton_server import ANSWERS

from rekd_deploy.client.client import Client
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import RejectedError
from rekd_deploy.export.graphs import export
from rekd_deploy.repository.config import ENSEMBLE, SINGLE
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.server import TritonServer
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module", params=["vit", "bert-paper"])
def served(wheel, request, tmp_path_factory):
    """A model and a server with its ensemble and its single graph."""
    folder = tmp_path_factory.mktemp(request.param)
    model = KINDS[request.param]()
    artefacts = export(save(model, folder / "checkpoint"), folder, single_graph=True)
    root = write_repository(artefacts, folder / "repository", text_endpoint=True)
    with TritonServer(root, 0, 0, 0, log_file=folder / "log") as server:
        yield model, server


def items(model, texts):
    return some_images(70, height=20, width=15) if model.preprocessor.settings.kind == "image" else texts * 14


@pytest.mark.parametrize("name", [ENSEMBLE, SINGLE])
def test_answers_are_the_models(served, texts, name):
    model, server = served
    many = items(model, texts)
    for url in (server.grpc_url, server.http_url):
        with Client(url, model=name) as client:
            assert_same_answers(client.predict(many), model.predict(many))


def test_every_subset_of_the_answers(served, texts):
    model, server = served
    inputs = model.preprocessor(items(model, texts)[:2]).inputs
    transport = open_transport(server.grpc_url, 10.0)
    whole = transport.submit(ENSEMBLE, inputs, ANSWERS).result()
    for count in range(1, 5):
        for names in itertools.combinations(ANSWERS, count):
            part = transport.submit(ENSEMBLE, inputs, names).result()
            assert set(part) == set(names)
            for name in names:
                np.testing.assert_array_equal(part[name], whole[name])
    transport.close()


def test_tensors_of_another_shape_are_refused(served):
    model, server = served
    is_image = model.preprocessor.settings.kind == "image"
    bad = {"pixels": np.zeros((1, 16, 13, 1), np.uint8)} if is_image else {
        "input_ids": np.full((1, 4), 999), "attention_mask": np.ones((1, 4), np.int64)
    }
    transport = open_transport(server.grpc_url, 10.0)
    with pytest.raises(RejectedError):
        transport.submit(ENSEMBLE, bad, ["logits"]).result()
    transport.close()


def raw_answers(server, kind, contents):
    """Predictions of the ensemble that takes bytes, over HTTP as a thin client would."""
    from tritonclient.http import InferenceServerClient, InferInput

    client = InferenceServerClient(server.http_url.removeprefix("http://"))
    tensor = InferInput(kind, [len(contents), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[content] for content in contents], dtype=object))
    answer = client.infer(f"rekd_{kind}", [tensor])
    client.close()
    return {name: answer.as_numpy(name) for name in ("label", "rationale", "probabilities", "truncated")}


def test_raw_texts_and_image_files(served, texts):
    model, server = served
    kind = model.preprocessor.settings.kind
    if kind == "image":
        some = some_images(5, height=20, width=15)
        contents = [as_png(image) for image in some]
    else:
        some, contents = texts, [text.encode() for text in texts]
    answers = raw_answers(server, kind, contents)
    for row, wanted in enumerate(model.predict(some)):
        assert answers["label"][row, 0].decode() == wanted.label
        np.testing.assert_allclose(answers["probabilities"][row], [*wanted.probabilities.values()], atol=1e-4)
        assert bool(answers["truncated"][row, 0]) == wanted.truncated
        for part, other in zip(json.loads(answers["rationale"][row, 0]), wanted.rationale, strict=True):
            exact = json.loads(json.dumps(vars(other)))
            assert part | {"score": 0} == exact | {"score": 0} and abs(part["score"] - exact["score"]) <= 1e-4


def test_bad_bytes_are_refused_and_the_server_goes_on(served, texts):
    from tritonclient.utils import InferenceServerException

    model, server = served
    kind = model.preprocessor.settings.kind
    good = as_png(some_images(1)[0]) if kind == "image" else b"good film"
    for bad in (b"", b"\xff\xfe", good[: len(good) // 2] if kind == "image" else b" "):
        before = raw_answers(server, kind, [good])
        with pytest.raises(InferenceServerException, match="image 2|text 2"):
            raw_answers(server, kind, [good, bad])
        np.testing.assert_array_equal(raw_answers(server, kind, [good])["label"], before["label"])


def as_png(image):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
