"""Raw texts and image files through the two steps of their ensemble, as Triton's stub would run them."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families import some_images
from PIL import Image
from test_triton_model import Request, utilities  # noqa: F401  a fixture

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.repository.backend.text import LARGEST_TEXT
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import ServingSettings, read_config
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.repository.text_endpoint import ANSWER, PREPARE, RAW, place_raw, raw_configs
from rekd_deploy.repository.writer import write_repository


def artefacts_of(model):
    nothing = Path("not needed")
    return Artefacts(pair_signature(model), nothing, nothing, model.preprocessor, tuple(model.labels), {})


@pytest.fixture(scope="module")
def root(artefacts, tmp_path_factory):
    return write_repository(artefacts, tmp_path_factory.mktemp("raw") / "r", text_endpoint=True)


@pytest.fixture
def start(utilities, monkeypatch):  # noqa: F811
    """A function: model folder -> its model.py, loaded and initialised."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def started(folder, kind, step):
        config = {
            "input": [{"name": name} for name in (
                [kind] if step == "prepare" else
                [*(["text", "tokens", "cut"] if kind == "text" else ["sizes"]), "scores", "mask", "probabilities"]
            )],
            "parameters": {"step": {"string_value": step}},
        }
        specification = importlib.util.spec_from_file_location(f"raw_{step}", folder / "1" / "model.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"})
        return model

    return started


def column(*contents):
    return np.array([[each] for each in contents], dtype=object)


def ask(model, arrays, *outputs):
    return model.execute([Request(arrays, list(outputs))])[0]


ANSWERS = ("label", "rationale", "rate", "truncated", "probabilities")


@pytest.mark.parametrize("operator", ["compact", "zero"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_steps_of_the_endpoint(kind, operator):
    from conftest import make_image_rationalizer, make_rationalizer

    model = (make_rationalizer if kind == "text" else make_image_rationalizer)(operator=operator)
    made, settings = artefacts_of(model), ServingSettings()
    configs = build_configs(made, settings) | raw_configs(made, settings)
    whole = configs[RAW[kind]]
    assert [tensor.name for tensor in whole.input] == [kind]
    assert [tensor.name for tensor in whole.output] == list(ANSWERS)
    assert [step.model_name for step in whole.ensemble_scheduling.step] == [
        PREPARE, "rekd_selector", "rekd_predictor", ANSWER
    ]
    made = replace(made, single=Path("not needed"))
    configs = build_configs(made, settings) | raw_configs(made, settings)
    steps = configs[RAW[kind]].ensemble_scheduling.step
    assert [step.model_name for step in steps] == [PREPARE, "rekd_single", ANSWER], "one graph, one step fewer"


def test_the_repository_holds_the_models_and_knows_their_files(root, artefacts):
    files = check_repository(root)["repository"]["files"]
    for name in ("rekd_text/config.pbtxt", "rekd_text/1/.gitkeep", "rekd_prepare/1/tokenizer.json",
                 "rekd_answer/1/rekd_train/inputs/text.py"):
        assert name in files
    before = root.stat().st_ino
    write_repository(artefacts, root, text_endpoint=True)
    assert root.stat().st_ino == before, "the same export again changes nothing"


def test_versions_and_the_way_back(artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "r", text_endpoint=True)
    write_repository(replace(artefacts, manifest={**artefacts.manifest, "x": 1}), root, text_endpoint=True, keep=2)
    steps = read_config(root / "rekd_text" / "config.pbtxt").ensemble_scheduling.step
    assert [step.model_version for step in steps] == [2, 2, 2, 2]
    assert sorted(path.name for path in (root / PREPARE).iterdir()) == ["2", "config.pbtxt"]
    write_repository(artefacts, root)
    assert not (root / "rekd_text").exists() and not (root / PREPARE).exists()
    check_repository(root)


def test_texts_become_the_models_tensors_and_its_answers(root, start, rationalizer, texts):
    prepare, answer = start(root / PREPARE, "text", "prepare"), start(root / ANSWER, "text", "answer")
    raw = column(*(text.encode() for text in texts))
    tensors = ask(prepare, {"text": raw}, "input_ids", "attention_mask", "tokens", "cut").outputs
    for name, array in rationalizer.preprocessor(texts).inputs.items():
        np.testing.assert_array_equal(tensors[name], array)
    expected = rationalizer.predict(texts)
    width = tensors["input_ids"].shape[1]
    mask, scores = np.zeros((len(texts), width), bool), np.zeros((len(texts), width), np.float32)
    for row, prediction in enumerate(expected):
        for piece in prediction.pieces:
            mask[row, piece.position], scores[row, piece.position] = True, piece.score
    probabilities = np.array([[*each.probabilities.values()] for each in expected], np.float32)
    handed = {name: tensors[name] for name in ("tokens", "cut")}
    given = {"text": raw, **handed, "mask": mask, "scores": scores, "probabilities": probabilities}
    answered = ask(answer, given, *ANSWERS).outputs
    for row, prediction in enumerate(expected):
        assert answered["label"][row, 0].decode() == prediction.label
        assert [(s["start"], s["end"], s["text"]) for s in json.loads(answered["rationale"][row, 0])] == [
            (span.start, span.end, span.text) for span in prediction.rationale
        ]
        assert answered["rate"][row, 0] == pytest.approx(prediction.rate)
        assert answered["truncated"][row, 0] == prediction.truncated
    assert list(ask(answer, given, "label").outputs) == ["label"]
    assert not (root / ANSWER / "1" / "tokenizer.json").exists(), "texts are tokenised once"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "text 2 is empty"),
        (b"  ", "only white space"),
        (b"\xff\xfe", "text 2 is not UTF-8"),
        (b"x" * (LARGEST_TEXT + 1), "at most 1048576"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_and_its_neighbours_are_not(root, start, content, reason):
    prepare = start(root / PREPARE, "text", "prepare")
    good = Request({"text": column(b"good film")}, ["input_ids"])
    bad = Request({"text": column(b"good", content)}, ["input_ids"])
    first, refused, last = prepare.execute([good, bad, good])
    assert reason in str(refused.error) and refused.error.code == 1
    np.testing.assert_array_equal(first.outputs["input_ids"], last.outputs["input_ids"])


def encoded(array, format, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture
def image_root(image_rationalizer, tmp_path):
    for name in (PREPARE, ANSWER, RAW["image"]):
        (tmp_path / name / "1").mkdir(parents=True)
    place_raw(artefacts_of(image_rationalizer), tmp_path, 1)
    return tmp_path


def test_image_files_become_the_models_tensors_and_boxes(image_root, start, image_rationalizer):
    prepare = start(image_root / PREPARE, "image", "prepare")
    answer = start(image_root / ANSWER, "image", "answer")
    images = some_images(3, height=20, width=30)
    tensors = ask(prepare, {"image": column(*(encoded(each, "PNG") for each in images))}, "pixels", "sizes").outputs
    np.testing.assert_array_equal(tensors["pixels"], image_rationalizer.preprocessor(images).inputs["pixels"])
    assert tensors["sizes"].tolist() == [[30, 20]] * 3
    expected = image_rationalizer.predict(images)
    mask, scores = np.zeros((3, 12), bool), np.zeros((3, 12), np.float32)
    for row, prediction in enumerate(expected):
        for patch in prediction.rationale:
            mask[row, patch.row * 3 + patch.column] = True
            scores[row, patch.row * 3 + patch.column] = patch.score
    probabilities = np.array([[*each.probabilities.values()] for each in expected], np.float32)
    given = {"sizes": tensors["sizes"], "mask": mask, "scores": scores, "probabilities": probabilities}
    answered = ask(answer, given, *ANSWERS).outputs
    for row, prediction in enumerate(expected):
        assert answered["label"][row, 0].decode() == prediction.label
        boxes = [tuple(part["box"]) for part in json.loads(answered["rationale"][row, 0])]
        assert boxes == [patch.box for patch in prediction.rationale]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no image", "image 1 cannot be read: neither JPEG nor PNG"),
        (encoded(some_images(1)[0], "PNG")[:90], "image 1 cannot be read"),
        (encoded(some_images(1)[0], "BMP"), "neither JPEG nor PNG"),
        (b"", "neither JPEG nor PNG"),
    ],
)
def test_files_that_are_no_images_are_refused(image_root, start, content, reason):
    refused = ask(start(image_root / PREPARE, "image", "prepare"), {"image": column(content)}, "pixels")
    assert reason in str(refused.error) and refused.error.code == 1


def test_images_too_large_are_not_decoded(image_root, start, monkeypatch):
    prepare = start(image_root / PREPARE, "image", "prepare")
    monkeypatch.setitem(prepare._answer.__globals__, "LARGEST_IMAGE", 100)
    refused = ask(prepare, {"image": column(encoded(some_images(1)[0], "JPEG"))}, "pixels")
    assert "12 x 16 pixels; at most 100" in str(refused.error)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_copied_modules_suffice(kind, root, image_root, tmp_path):
    """A server has no rekd: the step is built where nothing of ours can be imported but the copies."""
    source = (root if kind == "text" else image_root) / PREPARE / "1"
    folder = shutil.copytree(source, tmp_path / "alone")
    code = (
        "import sys, json; from pathlib import Path; sys.path[:] = [p for p in sys.path if p]\n"
        f"folder = Path({str(folder)!r}); sys.path.insert(0, str(folder)); sys.meta_path = "
        "[f for f in sys.meta_path if 'editable' not in getattr(f, '__name__', type(f).__name__).lower()]\n"
        "import model, rekd_train\n"
        "assert rekd_train.__file__.startswith(str(folder))\n"
        "model.build_step('prepare', json.loads((folder / 'served.json').read_text()), folder)\n"
        "assert not {'torch', 'rekd_deploy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
