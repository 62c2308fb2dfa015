"""Texts and image files through the two steps of their endpoint, as Triton's stub would run them."""

from __future__ import annotations

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
from test_triton_model import Request, started, utilities  # noqa: F401  a fixture

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.repository.backend.endpoint import LARGEST_TEXT
from rekd_deploy.repository.config import (
    ANSWER,
    CONFIG_FILE,
    ENDPOINTS,
    PREPARE,
    ServingSettings,
    config_text,
    read_config,
)
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.repository.text_endpoint import endpoint_configs, place_endpoint
from rekd_deploy.repository.writer import write_repository


def artefacts_of(model):
    nothing = Path("not needed")
    return Artefacts(pair_signature(model), nothing, nothing, model.preprocessor, tuple(model.labels), {})


@pytest.fixture(scope="module")
def root(artefacts, tmp_path_factory):
    return write_repository(artefacts, tmp_path_factory.mktemp("endpoint") / "r", text_endpoint=True)


@pytest.fixture
def image_root(image_rationalizer, tmp_path):
    made = artefacts_of(image_rationalizer)
    for name, config in endpoint_configs(made, ServingSettings()).items():
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / CONFIG_FILE).write_text(config_text(config))
    place_endpoint(made, tmp_path, "1")
    return tmp_path


@pytest.fixture
def start(utilities, monkeypatch):  # noqa: F811
    """A function: repository, model -> its model.py, loaded and initialised."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return started


def column(*contents):
    return np.array([[each] for each in contents], dtype=object)


def ask(model, arrays, *outputs):
    return model.execute([Request(arrays, list(outputs))])[0]


ANSWERS = ("label", "rationale", "rate", "truncated", "probabilities")


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_steps_of_the_endpoint(kind, rationalizer, image_rationalizer):
    pair = artefacts_of(rationalizer if kind == "text" else image_rationalizer)
    for made, graphs in (
        (pair, ["rekd_selector", "rekd_predictor"]), (replace(pair, single=Path("not needed")), ["rekd_single"])
    ):
        whole = endpoint_configs(made, ServingSettings())[ENDPOINTS[kind]]
        assert [tensor.name for tensor in whole.input] == [kind]
        assert [tensor.name for tensor in whole.output] == list(ANSWERS)
        assert [step.model_name for step in whole.ensemble_scheduling.step] == [PREPARE, *graphs, ANSWER]


def test_the_repository_holds_the_models_and_knows_their_files(root, artefacts):
    files = check_repository(root)["repository"]["files"]
    for name in ("rekd_text/config.pbtxt", "rekd_text/1/.gitkeep", "rekd_prepare/1/tokenizer.json",
                 "rekd_answer/1/rekd_train/inputs/text.py"):
        assert name in files
    assert "rekd_answer/1/tokenizer.json" not in files, "texts are tokenised once"
    before = root.stat().st_ino
    write_repository(artefacts, root, text_endpoint=True)
    assert root.stat().st_ino == before, "the same export again changes nothing"


def test_a_new_version_of_it_and_an_export_without_it(artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "r", text_endpoint=True)
    write_repository(replace(artefacts, manifest={**artefacts.manifest, "x": 1}), root, text_endpoint=True, keep=2)
    steps = read_config(root / "rekd_text" / "config.pbtxt").ensemble_scheduling.step
    assert [step.model_version for step in steps] == [2, 2, 2, 2]
    assert sorted(path.name for path in (root / PREPARE).iterdir()) == ["2", "config.pbtxt"]
    write_repository(artefacts, root)
    assert not (root / "rekd_text").exists() and not (root / PREPARE).exists()
    check_repository(root)


def answered(answer, handed, expected, indices, width):
    """Check the answers to outputs that say what ``expected`` does; the rationales. ``indices``: of their parts."""
    mask, scores = np.zeros((len(expected), width), bool), np.zeros((len(expected), width), np.float32)
    for row, prediction in enumerate(expected):
        for index, score in indices(prediction):
            mask[row, index], scores[row, index] = True, score
    probabilities = np.array([[*each.probabilities.values()] for each in expected], np.float32)
    given = {**handed, "mask": mask, "scores": scores, "probabilities": probabilities}
    assert list(ask(answer, given, "label").outputs) == ["label"]
    found = ask(answer, given, *ANSWERS).outputs
    np.testing.assert_array_equal(found["probabilities"], probabilities)
    for row, prediction in enumerate(expected):
        assert found["label"][row, 0].decode() == prediction.label
        assert found["rate"][row, 0] == pytest.approx(prediction.rate)
        assert found["truncated"][row, 0] == prediction.truncated
    return [json.loads(each) for each in found["rationale"][:, 0]]


def test_texts_become_the_models_tensors_and_its_answers(root, start, rationalizer, texts):
    prepare, answer = start(root, PREPARE), start(root, ANSWER)
    content = column(*(text.encode() for text in texts))
    tensors = ask(prepare, {"text": content}, "input_ids", "attention_mask", "tokens", "cut").outputs
    for name, array in rationalizer.preprocessor(texts).inputs.items():
        np.testing.assert_array_equal(tensors[name], array)
    expected, width = rationalizer.predict(texts), tensors["input_ids"].shape[1]
    handed = {"text": content, "tokens": tensors["tokens"], "cut": tensors["cut"]}
    spans = answered(
        answer, handed, expected, lambda each: [(piece.position, piece.score) for piece in each.pieces], width
    )
    for found, prediction in zip(spans, expected, strict=True):
        assert [(s["start"], s["end"], s["text"]) for s in found] == [
            (span.start, span.end, span.text) for span in prediction.rationale
        ]


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
    prepare = start(root, PREPARE)
    good = Request({"text": column(b"good film")}, ["input_ids"])
    bad = Request({"text": column(b"good", content)}, ["input_ids"])
    first, refused, last = prepare.execute([good, bad, good])
    assert reason in str(refused.error) and refused.error.code == 1
    np.testing.assert_array_equal(first.outputs["input_ids"], last.outputs["input_ids"])


def encoded(array, format):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format)
    return stream.getvalue()


def test_image_files_become_the_models_tensors_and_boxes(image_root, start, image_rationalizer):
    prepare, answer = start(image_root, PREPARE), start(image_root, ANSWER)
    images = some_images(3, height=20, width=30)
    tensors = ask(prepare, {"image": column(*(encoded(each, "PNG") for each in images))}, "pixels", "sizes").outputs
    np.testing.assert_array_equal(tensors["pixels"], image_rationalizer.preprocessor(images).inputs["pixels"])
    assert tensors["sizes"].tolist() == [[30, 20]] * 3
    expected = image_rationalizer.predict(images)
    patches = answered(
        answer, {"sizes": tensors["sizes"]}, expected,
        lambda each: [(patch.row * 3 + patch.column, patch.score) for patch in each.rationale], 12,
    )
    for found, prediction in zip(patches, expected, strict=True):
        assert [tuple(part["box"]) for part in found] == [patch.box for patch in prediction.rationale]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no image", "image 1 cannot be read: neither JPEG nor PNG"),
        (encoded(some_images(1)[0], "PNG")[:90], "image 1 cannot be read"),
        (encoded(some_images(1)[0], "BMP"), "neither JPEG nor PNG"),
        (encoded(some_images(1, 20, 30)[0], "JPEG"), "30 x 20 pixels; at most 200"),
    ],
)
def test_files_that_cannot_be_used_are_refused(image_root, start, monkeypatch, content, reason):
    prepare = start(image_root, PREPARE)
    monkeypatch.setitem(prepare._answer.__globals__, "LARGEST_IMAGE", 200)
    refused = ask(prepare, {"image": column(content)}, "pixels")
    assert reason in str(refused.error) and refused.error.code == 1


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
