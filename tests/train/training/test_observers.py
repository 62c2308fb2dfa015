"""Logs of training; divergence and collapse are noticed, and only they."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from toys import toy_config

from rekd_train.errors import MissingExtraError, TrainingError
from rekd_train.training.observers import JsonLines, Several, TensorBoard, Watch, readings


def tell(observer):
    observer.stage("rationale", 3, start=1)
    observer.step({})
    observer.step({"loss": 0.5, "rate": 0.1})
    observer.evaluated({"accuracy": 0.75, "best": 1.0})


def test_json_lines_are_appended_one_object_each(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    tell(JsonLines(path))
    tell(JsonLines(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 6
    assert [(line["event"], line["stage"], line["step"]) for line in lines[:3]] == [
        ("stage", "rationale", 1), ("step", "rationale", 3), ("evaluation", "rationale", 3),
    ]  # fmt: skip
    assert lines[0]["steps"] == 3 and lines[1]["loss"] == 0.5 and lines[2]["accuracy"] == 0.75
    assert all(line["time"] > 1e9 for line in lines)


def test_a_full_disk_is_one_clear_error():
    log = JsonLines(Path("/dev/null"))
    log._path = Path("/dev/full")
    with pytest.raises(TrainingError, match=r"/dev/full cannot be written \(.*No space left.*--resume"):
        log.stage("rationale", 3)


def test_a_resumed_run_goes_on_behind_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    first = JsonLines(path)
    first.stage("rationale", 80)
    for step in range(1, 61):
        first.step({"loss": float(step)} if step % 20 == 0 else {})
    first.evaluated({"accuracy": 0.5})
    with open(path, "a") as file:
        file.write('{"event": "step", "stage": "ratio')  # killed while it wrote
    again = JsonLines(path)
    again.stage("rationale", 80, start=20)
    for step in range(21, 81):
        again.step({"loss": step + 0.5} if step % 20 == 0 else {})
    found = readings(path)
    assert found["rationale"] == {"step": [20, 40, 60, 80], "loss": [20.0, 40.5, 60.5, 80.5]}
    assert found["rationale.dev"] == {"step": [], "accuracy": []}, "that step was done again"


def test_several_are_all_told(tmp_path):
    tell(Several([JsonLines(tmp_path / "a"), JsonLines(tmp_path / "b")]))
    assert len((tmp_path / "a").read_text().splitlines()) == len((tmp_path / "b").read_text().splitlines()) == 3


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtraError, match=r"\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_tensorboard_gets_scalars_by_stage(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "rationale/loss", "rationale/rate", "rationale/dev/accuracy", "rationale/dev/best",
    }  # fmt: skip
    (event,) = events.Scalars("rationale/loss")
    assert (event.step, event.value) == (3, 0.5)


def watch(target: float = 0.1, **options) -> Watch:
    config = toy_config(selection={"target": target, "budget": None}, stages={"collapse_window": 60})
    return Watch("rationale", config, 20, **options)


@pytest.mark.parametrize("figures", [{"loss": float("nan")}, {"loss": 1.0, "penalty": float("inf")}])
def test_what_is_not_finite_ends_the_run(figures):
    with pytest.raises(TrainingError, match=r"rationale: diverged, (loss is nan|penalty is inf) at step 40; fix:"):
        watch().judge(40, figures)


@pytest.mark.parametrize("rate", [0.0, 0.004, 0.96, 1.0])
def test_a_whole_window_of_nothing_or_everything_ends_the_run(rate):
    judge = watch()
    for step in (20, 40):
        judge.judge(step, {"rate": rate})
        assert not judge.healthy
    with pytest.raises(TrainingError, match="collapsed.*target 10.00%.*fix:"):
        judge.judge(60, {"rate": rate})


def test_a_way_through_the_extremes_is_no_collapse():
    judge = watch()
    for step, rate in enumerate([1.0, 1.0, 0.5, 0.0, 0.0, 0.02, 0.0, 0.0, 0.1, 0.09]):
        judge.judge(20 * step, {"rate": rate})
    assert judge.healthy


def test_a_target_of_nearly_everything_may_keep_everything():
    judge = watch(target=0.95)
    for step in range(9):
        judge.judge(20 * step, {"rate": 1.0})


def test_a_resumed_watch_remembers():
    first = watch()
    for step in (20, 40):
        first.judge(step, {"rate": 0.0})
    with pytest.raises(TrainingError, match="collapsed"):
        watch(rates=first.rates).judge(60, {"rate": 0.0})
