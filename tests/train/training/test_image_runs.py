"""Whole runs on images: far too short to learn anything, long enough to go through every step."""

import json

import numpy as np
import pytest
from conftest import fashion_folder

from rekd_train.checkpoints import checkpoint
from rekd_train.config.run import run_config
from rekd_train.data import load_data
from rekd_train.runs import calibrate_run, evaluate_run, train_run

SMALL = [
    "data.train_examples=64", "stages.classifier_epochs=1", "stages.rationale_epochs=1", "stages.compact_epochs=1",
    *(f"{role}.{size}" for role in ("selector", "predictor") for size in ("layers=1", "width=16", "feedforward=16")),
]  # fmt: skip


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory):
    root = tmp_path_factory.mktemp("mosaic")
    settings = [*SMALL, f"data.path={fashion_folder(root / 'f', 100)}"]
    config = run_config("mosaic_2x2", settings)
    train_run(config, root / "pair", device="cpu")
    return root / "pair", config


def test_a_mosaic_is_trained_and_held_against_the_true_tile(mosaic):
    path, _ = mosaic
    report = evaluate_run(path, draws=0, device="cpu")
    assert report["examples"] == 100 and report["truth"]["examples"] == 100
    assert "Fashion-MNIST" in report["data"]


def test_a_checkpoint_carries_real_images(mosaic):
    path, config = mosaic
    with np.load(path / "examples.npz") as stored:
        pixels, labels = stored["pixels"], stored["labels"]
    dev = load_data(config.data).splits["dev"]
    assert pixels.shape == (len(dev), 56, 56, 1) and pixels.dtype == np.uint8
    assert (pixels == dev.images[:64]).all() and (labels == dev.labels[:64]).all()
    card = (path / "README.md").read_text()
    assert "How unselected patches are removed" in card and "Fashion-MNIST" in card


def test_a_teacher_is_asked_anew_where_images_are_augmented(tmp_path):
    settings = [*SMALL, f"data.path={fashion_folder(tmp_path / 'f', 100)}", "data.augmentation=crop_flip"]
    teacher = run_config("fashion_teacher", settings)
    train_run(teacher, tmp_path / "teacher", device="cpu")
    student = run_config("fashion_student", settings)
    metrics = train_run(student, tmp_path / "student", teacher=tmp_path / "teacher", device="cpu")
    assert 0 < metrics["test"]["rate"] <= student.selection.budget


def test_an_imported_vision_pair_is_calibrated_on_other_images(tmp_path):
    pytest.importorskip("sklearn")
    from conftest import make_image_rationalizer

    pair = make_image_rationalizer(labels=tuple(str(digit) for digit in range(10)))
    path = checkpoint.save(pair, tmp_path / "pair", training={"name": "imported", "stage": "imported"})
    budget = ["selection.budget=0.5"]
    metrics = calibrate_run(path, tmp_path / "calibrated", 0.25, "cpu", data="digits", overrides=budget)
    assert metrics["dev"]["rate"] == pytest.approx(0.25, abs=0.08)
    assert json.loads((tmp_path / "calibrated" / "policy.json").read_text())["policy"]["budget"] == 0.5
