"""Images from a file to a highlighted answer: client, model of the python backend, command, rendering."""

from __future__ import annotations

import json
from concurrent.futures import Future

import numpy as np
import pytest
from families import assert_same_answers, some_images
from PIL import Image
from test_triton_model import ask, start, utilities  # noqa: F401  fixtures

from rekd_deploy.cli import query
from rekd_deploy.client import Client
from rekd_deploy.errors import RepositoryError, VersionMismatchError
from rekd_deploy.examples import generated_images, parity_examples
from rekd_deploy.export import export
from rekd_deploy.pipeline import Pipeline
from rekd_deploy.render import plain_text
from rekd_deploy.render_image import highlighted
from rekd_deploy.repository import read_description, write_repository
from rekd_deploy.served import ServedDescription
from rekd_deploy.transport import Transport
from rekd_deploy.triton_config import ENSEMBLE, PREDICTOR, SELECTOR, read_config
from rekd_train.checkpoint import save
from rekd_train.command import run
from rekd_train.errors import CheckpointError, InputError
from rekd_train.prediction import Patch, Prediction


@pytest.fixture(scope="module")
def checkpoint(image_rationalizer, tmp_path_factory):
    return save(image_rationalizer, tmp_path_factory.mktemp("images") / "checkpoint")


@pytest.fixture(scope="module")
def repository(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return write_repository(export(checkpoint, folder), folder / "repository")


@pytest.fixture
def file(tmp_path):
    Image.fromarray(some_images(1, height=160, width=120)[0]).save(tmp_path / "shoe.png")
    return tmp_path / "shoe.png"


def test_arrays_pillow_images_and_paths(repository, image_rationalizer, file):
    array = np.asarray(Image.open(file))
    many = [file, str(file), Image.open(file), array, array[:, :, None], np.stack([array] * 3, axis=2)]
    with Pipeline(repository, batch_size=4) as pipeline:
        answers = pipeline.predict(many)
        assert_same_answers(answers, image_rationalizer.predict(many))
        assert_same_answers(pipeline.predict(np.stack(some_images())[..., None]), pipeline.predict(some_images()))
    assert answers[0].rationale and all(isinstance(patch, Patch) for patch in answers[0].rationale)
    left, top, right, bottom = answers[0].rationale[0].box
    assert (right - left, bottom - top) == (40, 40), "boxes are in pixels of the image as given"


def test_configs_take_pixels_as_they_are(repository):
    from tritonclient.grpc.model_config_pb2 import DataType

    for name, members in ((SELECTOR, ["pixels"]), (PREDICTOR, ["pixels", "positions", "kept"]), (ENSEMBLE, ["pixels"])):
        config = read_config(repository / name / "config.pbtxt")
        assert [tensor.name for tensor in config.input] == members
        assert (config.input[0].data_type, list(config.input[0].dims)) == (DataType.Value("TYPE_UINT8"), [16, 12, 1])
    assert list(read_config(repository / ENSEMBLE / "config.pbtxt").output[0].dims) == [12]


def test_description_round_trip(repository, image_rationalizer):
    description = read_description(repository)
    assert description == ServedDescription.from_parameters(description.to_parameters())
    assert description.preprocessor().fingerprint == image_rationalizer.preprocessor.fingerprint
    assert "tokenizer" not in description.to_parameters()
    broken = description.to_parameters() | {"preprocessing": '{"kind": "image", "height": 16}'}
    with pytest.raises(RepositoryError, match="cannot be read"):
        ServedDescription.from_parameters(broken)
    other = description.to_parameters()
    other["preprocessing"] = other["preprocessing"].replace('"rows": 4', '"rows": 2')
    with pytest.raises(RepositoryError, match="fingerprint"):
        ServedDescription.from_parameters(other).preprocessor()


class PipelineServer(Transport):
    """Answers from the repository's graphs; holds what was asked."""

    def __init__(self, repository):
        self.pipeline, self.shapes = Pipeline(repository), []
        self.parameters = read_description(repository).to_parameters()

    def model_config(self, model):
        return self.parameters, 4

    def submit(self, model, inputs, outputs):
        self.shapes.append(inputs["pixels"].shape)
        self.pipeline._open()
        found = self.pipeline._chain.run(inputs)
        future = Future()
        future.set_result({name: self.change(found)[name] for name in outputs})
        return future

    def change(self, outputs):
        return outputs

    def close(self):
        self.pipeline.close()


def test_client_sends_bytes_in_batches_and_answers_with_patches(repository, image_rationalizer):
    server = PipelineServer(repository)
    with Client(transport=server) as client:
        answers = client.predict(some_images(9, height=32, width=24))
        assert server.shapes == [(4, 16, 12, 1), (4, 16, 12, 1), (1, 16, 12, 1)]
        assert_same_answers(answers, image_rationalizer.predict(some_images(9, height=32, width=24)))
        with pytest.raises(InputError, match="image 6 is an array of float64"):
            client.predict([*some_images(6), np.zeros((16, 12))])
        with pytest.raises(InputError, match="empty"):
            client.predict([])
        server.change = lambda outputs: outputs | {"scores": outputs["scores"][:, :5]}
        with pytest.raises(VersionMismatchError, match="of shape"):
            client.predict(some_images())


def test_model_of_the_python_backend(start, repository, image_rationalizer):  # noqa: F811
    selector, predictor = start(SELECTOR), start(PREDICTOR)
    requests = [image_rationalizer.preprocessor(some_images(count)).inputs for count in (1, 3, 2)]
    chosen = [answer.outputs for answer in ask(selector, SELECTOR, *requests)]
    handed_over = [
        request | {name: answer[name] for name in ("positions", "kept")}
        for request, answer in zip(requests, chosen, strict=True)
    ]
    bad = dict(handed_over[0], positions=handed_over[0]["positions"] + 12)
    *answers, refused = ask(predictor, PREDICTOR, *handed_over, bad)
    expected = image_rationalizer.predict(some_images(3))
    np.testing.assert_allclose(
        answers[1].outputs["probabilities"], [list(answer.probabilities.values()) for answer in expected], atol=1e-4
    )
    assert "outside the patches 0..11" in str(refused.error)


def test_examples_are_the_checkpoints_else_generated(checkpoint, image_rationalizer, tmp_path):
    preprocessor = image_rationalizer.preprocessor
    made = parity_examples(checkpoint, preprocessor)
    assert made.source == "generated" and len(made.items) == 64 and made.items[0].shape == (16, 12, 1)
    assert np.std(generated_images(preprocessor.settings), axis=(1, 2, 3)).min() > 0
    pixels = np.stack(some_images(300))[..., None]
    np.savez(tmp_path / "examples.npz", pixels=pixels, labels=np.zeros(300))
    own = parity_examples(tmp_path, preprocessor)
    assert own.source == "checkpoint" and len(own.items) == 200 and (own.items[7] == pixels[7]).all()
    np.savez(tmp_path / "examples.npz", pixels=pixels[:, :8])
    with pytest.raises(CheckpointError, match=r"examples.npz holds uint8 \(300, 8, 12, 1\)"):
        parity_examples(tmp_path, preprocessor)
    (tmp_path / "examples.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="examples.npz is damaged"):
        parity_examples(tmp_path, preprocessor)
    with pytest.raises(InputError, match="reads images; fix: leave out --parity-texts"):
        parity_examples(tmp_path, preprocessor, tmp_path / "texts.txt")


def test_kept_patches_stay_bright_and_the_rest_is_dimmed():
    image = np.full((16, 12), 200, np.uint8)
    answer = Prediction("bag", {"bag": 1.0}, [Patch(1, 2, (8, 4, 12, 8), 0.5)], 1 / 12, False)
    shown = np.asarray(highlighted(image, answer))
    factor = 16
    assert shown.shape == (16 * factor, 12 * factor, 3)
    assert tuple(shown[6 * factor, 10 * factor]) == (200, 200, 200)
    assert tuple(shown[6 * factor, 6 * factor]) == (60, 60, 60)
    assert tuple(shown[4 * factor, 8 * factor]) == (255, 213, 0) == tuple(shown[8 * factor - 1, 12 * factor - 1])
    assert plain_text(answer) == "bag  100.0%  from 8.3% of its patches\nrow 1 column 2 (+0.50)"


def rekd_query(capsys, *arguments):
    with pytest.raises(SystemExit) as request:
        run(query.app, [str(argument) for argument in arguments])
    return request.value.code, *capsys.readouterr()


def test_query_prints_json_and_writes_a_png(repository, image_rationalizer, file, tmp_path, capsys):
    out = tmp_path / "out.png"
    code, printed, error = rekd_query(capsys, "--local", repository, "--image", file, "--json", "--png", out)
    document = json.loads(printed)
    assert (code, error, document.pop("image")) == (0, "", str(file))
    assert_same_answers([Prediction.from_dict(document)], image_rationalizer.predict([file]))
    with Image.open(out) as written:
        assert (written.format, written.size) == ("PNG", (240, 320))
    assert json.loads(out.with_suffix(".json").read_text()) == {"image": str(file), **document}
    assert not file.with_name("shoe.rationale.png").exists(), "with --json nothing is written unasked"
    code, printed, _ = rekd_query(capsys, "--local", repository, "--image", file, "--image", file)
    assert code == 0 and printed.count("of its patches") == 2 and printed.count("row ") >= 2
    written = json.loads(file.with_name("shoe.rationale.json").read_text())
    assert written["label"] == document["label"]
    assert written["rationale"] and {"row", "column", "box", "score"} == set(written["rationale"][0])
    assert file.with_name("shoe.rationale.png").read_bytes() == out.read_bytes()


def test_query_refuses_in_one_line(repository, file, tmp_path, capsys):
    code, _, error = rekd_query(capsys, "--local", repository, "--image", tmp_path / "none.png")
    assert code == 1 and error == f"error: image 0: {tmp_path}/none.png does not exist\n"
    code, _, error = rekd_query(
        capsys, "--local", repository, "--image", file, "--png", tmp_path / "no" / "folder.png"
    )
    assert code == 1 and "cannot be written" in error and error.count("\n") == 1
    code, _, error = rekd_query(capsys, "--local", repository, "a text")
    assert code == 1 and error.count("\n") == 1 and "error: " in error
    twin = file.with_suffix(".jpg")
    code, _, error = rekd_query(capsys, "--local", repository, "--image", file, "--image", twin)
    assert code == 1 and "the same file" in error
    assert rekd_query(capsys, "--image", file, "a text")[0] == 2
    assert rekd_query(capsys, "--image", file, "--image", file, "--png", tmp_path / "x.png")[0] == 2
