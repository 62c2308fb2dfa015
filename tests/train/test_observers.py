"""Logs of training."""

import json
import sys
from pathlib import Path

import pytest

from rekd_train.errors import MissingExtraError, TrainingError
from rekd_train.training.observers import JsonLines, Several, TensorBoard, readings


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
