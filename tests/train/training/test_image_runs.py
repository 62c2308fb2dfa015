"""Whole runs on images: far too short to learn anything, long enough to go through every step."""

import json

import numpy as np
import pytest
import torch
from conftest import fashion_folder, make_image_rationalizer
from PIL import Image

from rekd_train.checkpoints import checkpoint
from rekd_train.config.run import run_config
from rekd_train.data import load_data
from rekd_train.data.image_knowledge import ImageReader, align_images
from rekd_train.data.knowledge import read_knowledge
from rekd_train.errors import ConfigError
from rekd_train.runs import calibrate_run, check_knowledge, evaluate_run, record_run, train_run

SMALL = [
    "data.train_examples=64", "stages.classifier_epochs=1", "stages.rationale_epochs=1", "stages.compact_epochs=1",
    *(f"{role}.{size}" for role in ("selector", "predictor") for size in ("layers=1", "width=16", "feedforward=16")),
]  # fmt: skip


def test_a_mosaic_is_trained_compared_with_the_true_tile_and_carries_its_images(tmp_path):
    path = tmp_path / "pair"
    config = run_config("mosaic_2x2", [*SMALL, f"data.path={fashion_folder(tmp_path / 'f', 100)}"])
    train_run(config, path, device="cpu")
    report = evaluate_run(path, draws=0, device="cpu")
    assert report["examples"] == report["truth"]["examples"] == 100 and "Fashion-MNIST" in report["data"]
    dev = load_data(config.data).splits["dev"]
    with np.load(path / "examples.npz") as stored:
        pixels, labels = stored["pixels"], stored["labels"]
    assert pixels.shape == (len(dev), 56, 56, 1) and pixels.dtype == np.uint8
    assert (pixels == dev.images[:64]).all() and (labels == dev.labels[:64]).all()
    card = (path / "README.md").read_text()
    assert "How unselected patches are removed" in card and "Fashion-MNIST" in card


def test_an_imported_vision_pair_is_calibrated_on_other_images(tmp_path):
    pytest.importorskip("sklearn")
    pair = make_image_rationalizer(labels=tuple(str(digit) for digit in range(10)))
    path = checkpoint.save(pair, tmp_path / "pair", training={"name": "imported", "stage": "imported"})
    budget = ["selection.budget=0.5"]
    metrics = calibrate_run(path, tmp_path / "calibrated", 0.25, "cpu", data="digits", overrides=budget)
    assert metrics["dev"]["rate"] == pytest.approx(0.25, abs=0.08)
    assert json.loads((tmp_path / "calibrated" / "policy.json").read_text())["policy"]["budget"] == 0.5


def test_an_image_pair_is_recorded_and_teaches_from_the_file(tmp_path):
    pytest.importorskip("pyarrow")
    generator = np.random.default_rng(0)
    for number in range(48):
        path = tmp_path / "pictures" / ("dark", "bright")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (20, 30), dtype=np.uint8) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    own = [*SMALL, "data.name=image_folder", f"data.path={tmp_path / 'pictures'}", "data.augmentation=none"]
    config, file = run_config("fashion_teacher", own), tmp_path / "k.parquet"
    train_run(config, tmp_path / "teacher", device="cpu")
    assert record_run(tmp_path / "teacher", file, device="cpu") == 38
    counts = check_knowledge(file, config.data)
    assert counts["statements"] == counts["known"] == 38 and counts["probabilities"] == counts["scores"] == 1
    pair, images = checkpoint.load(tmp_path / "teacher"), load_data(config.data).splits["train"].images
    knowledge = read_knowledge(file, pair.labels, ImageReader)
    said = align_images(knowledge, images, pair.preprocessor, 2, tmp_path / "pictures")
    scores = pair.select({"pixels": torch.from_numpy(pair.preprocessor(images).inputs["pixels"])}).scores
    np.testing.assert_allclose(said.scores, scores.detach(), rtol=0, atol=6e-4)
    metrics = train_run(run_config("fashion_student", own), tmp_path / "student", teacher=file, device="cpu")
    assert metrics["test"]["rate"] > 0
    with pytest.raises(ConfigError, match="images as they are; fix: --set data.augmentation=none"):
        train_run(run_config("fashion_student", [*own, "data.augmentation=flip"]), tmp_path / "other", teacher=file)
