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
from rekd_deploy.client import batching
from rekd_deploy.client.client import Client
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.client.render import captioned, highlighted, plain_text
from rekd_deploy.client.transport import Arrays, ModelConfig, Transport
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import RepositoryError, VersionMismatchError
from rekd_deploy.export.graphs import export
from rekd_deploy.parity.examples import generated_images, parity_examples
from rekd_deploy.repository.config import ENSEMBLE, PREDICTOR, SELECTOR, read_config
from rekd_deploy.repository.reader import read_description
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save
from rekd_train.cli.command import run
from rekd_train.errors import CheckpointError, InputError
from rekd_train.inputs.prediction import Patch, Prediction


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


@pytest.mark.parametrize(("filled_to", "counts"), [((), [5, 5, 3]), ((1, 4, 8), [1, 4, 4, 4])])
def test_batches_of_images_follow_their_order(image_rationalizer, monkeypatch, filled_to, counts):
    monkeypatch.setattr(batching, "A_BATCH", 1)
    images = some_images(13)
    batches = list(batching.Batches(image_rationalizer.preprocessor, images, 5, filled_to=filled_to))
    assert [len(places) for places, _ in batches] == counts
    assert [place for places, _ in batches for place in places] == list(range(13))
    for places, encoded in batches:
        assert all((encoded.inputs["pixels"][row, :, :, 0] == images[place]).all() for row, place in enumerate(places))


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

    def model_versions(self, model, timeout):
        return ["1"]

    def model_config(self, model, version, timeout):
        return ModelConfig(self.parameters, 4)

    def submit(self, model, inputs, outputs, *, timeout=None, request_id=""):
        self.shapes.append(inputs["pixels"].shape)
        self.pipeline.__enter__()
        found = self.pipeline._chain.run(inputs)
        future = Future()
        future.set_result(Arrays({name: self.change(found)[name] for name in outputs}))
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
        with pytest.raises(InputError, match="image 7 is an array of float64"):
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
    factor = 20
    assert shown.shape == (16 * factor, 12 * factor, 3)
    assert tuple(shown[6 * factor, 10 * factor]) == (200, 200, 200)
    assert tuple(shown[6 * factor, 6 * factor]) == (50, 50, 50)
    assert tuple(shown[4 * factor, 8 * factor]) == (255, 213, 0) == tuple(shown[8 * factor - 1, 12 * factor - 1])
    assert plain_text(answer) == "bag  100.0%  from 8.3% of its patches\nrow 2 column 3 (+0.50)"


def test_a_stronger_patch_is_brighter():
    image = np.full((16, 12), 200, np.uint8)
    scores = {(0, 0): 3.0, (1, 1): -1.0, (2, 2): 1.0}
    patches = [Patch(r, c, (c * 4, r * 4, c * 4 + 4, r * 4 + 4), score) for (r, c), score in scores.items()]
    shown = np.asarray(highlighted(image, Prediction("bag", {"bag": 1.0}, patches, 3 / 12, False)))
    assert [int(shown[(r * 4 + 2) * 20, (c * 4 + 2) * 20, 0]) for r, c in scores] == [200, 120, 160]
    assert [int(shown[r * 80, c * 80, 0]) for r, c in scores] == [255, 153, 204]


def test_label_and_probability_stand_above_the_picture():
    image = np.full((16, 12), 200, np.uint8)
    answers = [Prediction(label, {label: 0.75}, [], 0.0, False) for label in ("bag", "coat", "long label " * 20)]
    pictures = [np.asarray(captioned(image, answer)) for answer in answers]
    below = highlighted(image, answers[0])
    for picture in pictures:
        assert picture.shape[1] == 320 and (picture[-below.height :, 40:280] == np.asarray(below)).all()
        caption = picture[: -below.height]
        assert (caption > 200).any() and not caption[:, :8].any() and not caption[:, -8:].any(), "within its margins"
    assert (pictures[0] != pictures[1]).any()


def rekd_query(capsys, *arguments):
    with pytest.raises(SystemExit) as request:
        run(query.app, [str(argument) for argument in arguments])
    return request.value.code, *capsys.readouterr()


def test_query_prints_json_and_writes_nothing_unasked(repository, image_rationalizer, file, capsys):
    code, printed, error = rekd_query(capsys, "--local", repository, "--image", file, "--json")
    document = json.loads(printed)
    assert (code, error, document["image"]) == (0, "", str(file))
    assert_same_answers([Prediction.from_dict(document)], image_rationalizer.predict([file]))
    code, printed, _ = rekd_query(capsys, "--local", repository, "--image", file, "--image", file)
    assert code == 0 and printed.count("of its patches") == 2 and printed.count("row ") >= 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_query_saves_pictures_where_it_is_told(repository, file, tmp_path, capsys):
    folder = tmp_path / "new" / "pictures"
    code, printed, error = rekd_query(capsys, "--local", repository, "--image", file, "--json", "--save", folder)
    assert (code, error) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["shoe.rationale.json", "shoe.rationale.png"]
    assert json.loads((folder / "shoe.rationale.json").read_text()) == json.loads(printed)
    assert {"row", "column", "box", "score"} == set(json.loads(printed)["rationale"][0])
    with Image.open(folder / "shoe.rationale.png") as written:
        assert written.format == "PNG" and written.width == 320 < written.height
    code, printed, _ = rekd_query(capsys, "--local", repository, "--image", file, "--save", folder)
    assert code == 0 and f"written: {folder}/shoe.rationale.png\n" in printed


def test_query_refuses_in_one_line(repository, file, tmp_path, capsys):
    none = tmp_path / "none.png"
    code, _, error = rekd_query(capsys, "--local", repository, "--image", file, "--image", none)
    assert code == 1 and error.startswith(f"error: {none} does not exist; fix: ") and error.count("\n") == 1
    code, _, error = rekd_query(capsys, "--local", repository, "--image", file, "--save", file / "folder")
    assert code == 1 and "cannot be written: Not a directory; fix: " in error and error.count("\n") == 1
    assert rekd_query(capsys, "--local", repository, "a text") == (
        1, "", f"error: the model of {repository} reads images, not texts; fix: rekd-query --image FILE\n"
    )
    twin = file.with_suffix(".jpg")
    code, _, error = rekd_query(
        capsys, "--local", repository, "--image", file, "--image", twin, "--save", tmp_path / "new"
    )
    assert code == 1 and "the same file" in error and not (tmp_path / "new").exists()
    assert rekd_query(capsys, "--image", file, "a text")[0] == 2
    assert rekd_query(capsys, "a text", "--save", tmp_path)[0] == 2
