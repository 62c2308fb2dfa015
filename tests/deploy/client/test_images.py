"""Images from a file to a highlighted answer: client, model of the python backend, command, rendering."""

from __future__ import annotations

import json

import numpy as np
import pytest
from families import assert_same_answers, some_images
from PIL import Image
from test_triton_model import ask, start, utilities  # noqa: F401  fixtures

from rekd_deploy.cli import query
from rekd_deploy.client import batching
from rekd_deploy.client.client import Client
from rekd_deploy.client.connection import Address
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.client.render import captioned, highlighted, plain_text
from rekd_deploy.client.transport import Arrays, Transport
from rekd_deploy.export.graphs import export
from rekd_deploy.parity.examples import generated_images, parity_examples
from rekd_deploy.repository.config import PREDICTOR, SELECTOR
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
        predictions = pipeline.predict(many)
        assert_same_answers(predictions, image_rationalizer.predict(many))
        assert_same_answers(pipeline.predict(np.stack(some_images())[..., None]), pipeline.predict(some_images()))
    left, top, right, bottom = predictions[0].rationale[0].box
    assert (right - left, bottom - top) == (40, 40), "boxes are in pixels of the image as given"


@pytest.mark.parametrize(("filled_to", "counts"), [((), [5, 5, 3]), ((1, 4, 8), [1, 4, 4, 4])])
def test_batches_of_images_follow_their_order(image_rationalizer, monkeypatch, filled_to, counts):
    monkeypatch.setattr(batching, "A_BATCH", 1)
    images = some_images(13)
    batches = list(batching.Batches(image_rationalizer.preprocessor, images, 5, filled_to=filled_to))
    assert [len(indices) for indices, _ in batches] == counts
    assert [index for indices, _ in batches for index in indices] == list(range(13))
    for indices, encoded in batches:
        assert (encoded.inputs["pixels"][..., 0] == [images[index] for index in indices]).all()


class PipelineServer(Transport):
    """Answers from the repository's graphs; holds what was asked."""

    def __init__(self, repository):
        super().__init__(Address.parse("127.0.0.1:1"), 30.0, {})
        self.pipeline, self.shapes = Pipeline(repository), []
        self.parameters = read_description(repository).to_parameters()

    def model_versions(self, model, timeout):
        return ["1"]

    def model_config(self, model, version, timeout):
        return self.parameters, 4

    _told = _is_ready = None  # never asked

    def infer(self, request):
        self.shapes.append(request.inputs["pixels"].shape)
        with self.pipeline:
            return Arrays(self.pipeline._chain.run(request.inputs))


def test_client_sends_bytes_in_batches_and_answers_with_patches(repository, image_rationalizer):
    server = PipelineServer(repository)
    images = some_images(9, height=32, width=24)
    with Client(transport=server) as client:
        assert_same_answers(client.predict(images[:4]), image_rationalizer.predict(images[:4]))
        assert server.shapes == [(4, 16, 12, 1)]
        with pytest.raises(InputError, match="image 7 is an array of float64"):
            client.predict([*images[:6], np.zeros((16, 12))])


def test_model_of_the_python_backend(start, image_rationalizer):  # noqa: F811
    request = image_rationalizer.preprocessor(some_images(3)).inputs
    chosen = ask(start(SELECTOR), SELECTOR, request)[0].outputs
    good = request | {name: chosen[name] for name in ("positions", "kept")}
    found, refused = ask(start(PREDICTOR), PREDICTOR, good, good | {"positions": good["positions"] + 12})
    expected = [list(prediction.probabilities.values()) for prediction in image_rationalizer.predict(some_images(3))]
    np.testing.assert_allclose(found.outputs["probabilities"], expected, atol=1e-4)
    assert "outside the patches 0..11" in str(refused.error)


def test_examples_are_the_checkpoints_else_generated(checkpoint, image_rationalizer, tmp_path):
    preprocessor, file = image_rationalizer.preprocessor, tmp_path / "examples.npz"
    made = parity_examples(checkpoint, preprocessor)
    assert made.source == "generated" and len(made.items) == 64 and made.items[0].shape == (16, 12, 1)
    assert np.std(generated_images(preprocessor.settings), axis=(1, 2, 3)).min() > 0
    pixels = np.stack(some_images(300))[..., None]
    np.savez(file, pixels=pixels, labels=np.zeros(300))
    own = parity_examples(tmp_path, preprocessor)
    assert own.source == "checkpoint" and len(own.items) == 200 and (own.items[7] == pixels[7]).all()
    with pytest.raises(InputError, match="reads images; fix: leave out --parity-texts"):
        parity_examples(tmp_path, preprocessor, tmp_path / "texts.txt")
    np.savez(file, pixels=pixels[:, :8])
    with pytest.raises(CheckpointError, match=r"examples.npz holds uint8 \(300, 8, 12, 1\)"):
        parity_examples(tmp_path, preprocessor)
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="examples.npz is damaged"):
        parity_examples(tmp_path, preprocessor)


# rendering

GREY = np.full((16, 12), 200, np.uint8)


def bag(*patches, label="bag"):
    """A prediction with patches of 4 x 4 pixels: row, column, score."""
    kept = [Patch(r, c, (c * 4, r * 4, c * 4 + 4, r * 4 + 4), score) for r, c, score in patches]
    return Prediction(label, {label: 0.75}, kept, len(kept) / 12, False)


def test_stronger_patches_are_brighter_and_the_rest_is_dimmed():
    patches = [(0, 0, 3.0), (1, 1, -1.0), (2, 2, 1.0)]
    shown = np.asarray(highlighted(GREY, bag(*patches)))
    assert shown.shape == (16 * 20, 12 * 20, 3) and tuple(shown[6 * 20, 10 * 20]) == (50, 50, 50)
    assert [int(shown[(r * 4 + 2) * 20, (c * 4 + 2) * 20, 0]) for r, c, _ in patches] == [200, 120, 160]
    assert [int(shown[r * 80, c * 80, 0]) for r, c, _ in patches] == [255, 153, 204], "the frames"
    assert tuple(shown[0, 0]) == tuple(shown[79, 79]) == (255, 213, 0)
    assert plain_text(bag(*patches)) == (
        "bag  75.0%  from 25.0% of its patches\nrow 1 column 1 (+3.00), row 3 column 3 (+1.00), row 2 column 2 (-1.00)"
    )
    assert np.asarray(highlighted(GREY, bag((1, 2, 0.5))))[6 * 20, 10 * 20, 0] == 200, "a lone patch"


@pytest.mark.parametrize("label", ["bag", "long label " * 20])
def test_label_and_probability_stand_above_the_picture(label):
    below = np.asarray(highlighted(GREY, bag()))
    picture = np.asarray(captioned(GREY, bag(label=label)))
    caption = picture[: -len(below)]
    assert picture.shape[1] == 320 and (picture[-len(below) :, 40:280] == below).all()
    assert (caption > 200).any() and not caption[:, :8].any() and not caption[:, -8:].any(), "within its margins"
    assert (caption != np.asarray(captioned(GREY, bag(label="coat")))[: -len(below)]).any()


# the command


@pytest.fixture
def rekd_query(repository, capsys):
    """A function: arguments -> exit code, stdout, stderr."""

    def queried(*arguments):
        with pytest.raises(SystemExit) as request:
            run(query.app, ["--local", str(repository), *map(str, arguments)])
        return request.value.code, *capsys.readouterr()

    return queried


def test_query_prints_and_saves_what_it_is_told(rekd_query, image_rationalizer, file, tmp_path):
    code, printed, error = rekd_query("--image", file, "--json")
    document = json.loads(printed)
    assert (code, error, document["image"]) == (0, "", str(file))
    assert_same_answers([Prediction.from_dict(document)], image_rationalizer.predict([file]))
    code, printed, _ = rekd_query("--image", file, "--image", file)
    assert code == 0 and printed.count("of its patches") == 2 and printed.count("row ") >= 2
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing is written unasked"
    folder = tmp_path / "new" / "pictures"
    code, printed, error = rekd_query("--image", file, "--save", folder)
    assert (code, error) == (0, "") and f"written: {folder}/shoe.rationale.png\n" in printed
    assert json.loads((folder / "shoe.rationale.json").read_text()) == document
    with Image.open(folder / "shoe.rationale.png") as written:
        assert written.format == "PNG" and written.width == 320 < written.height


def test_query_refuses_in_one_line(rekd_query, repository, file, tmp_path):
    none, twin, new = tmp_path / "none.png", file.with_suffix(".jpg"), tmp_path / "new"
    for arguments, complaint in (
        (["--image", file, "--image", none], "/none.png) does not exist; fix: "),
        (["--image", file, "--save", file / "folder"], "cannot be written: Not a directory; fix: "),
        (["--image", file, "--image", twin, "--save", new], "2 images would be saved to the same file"),
        (["a text"], f"the model of {repository} reads images, not texts; fix: rekd-query --image FILE\n"),
    ):
        code, printed, error = rekd_query(*arguments)
        assert (code, printed) == (1, "") and complaint in error and error.count("\n") == 1
    assert not new.exists()
    assert rekd_query("--image", file, "a text")[0] == rekd_query("a text", "--save", new)[0] == 2
