"""Logs of training; divergence and collapse are noticed, and only they; which state of a stage is the best."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from toys import toy_config

from rekd_train.errors import MissingExtraError, TrainingError
from rekd_train.training.observers import Best, JsonLines, Several, TensorBoard, Watch


def tell(observer):
    observer.stage("rationale", 3, start=1)
    observer.step({})
    observer.step({"loss": 0.5, "selection_rate": 0.1})
    observer.evaluated({"accuracy": 0.75, "best": 1.0})


def test_json_lines_are_appended_one_object_each_behind_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    tell(JsonLines(path))
    with open(path, "a") as file:
        file.write('{"event": "step", "stage": "ratio')  # killed while it wrote
    tell(Several([JsonLines(path), JsonLines(tmp_path / "other")]))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["stage"], line["step"]) for line in lines] == 2 * [
        ("stage", "rationale", 1), ("step", "rationale", 3), ("evaluation", "rationale", 3),
    ]  # fmt: skip
    assert lines[0]["steps"] == 3 and lines[1]["loss"] == 0.5 and lines[2]["accuracy"] == 0.75
    assert all(line["time"] > 1e9 for line in lines)
    assert len((tmp_path / "other").read_text().splitlines()) == 3


def test_a_full_disk_is_one_clear_error():
    log = JsonLines(Path("/dev/null"))
    log._path = Path("/dev/full")
    with pytest.raises(TrainingError, match=r"/dev/full cannot be written \(.*No space left.*--resume"):
        log.stage("rationale", 3)


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
    figures = ("loss", "selection_rate", "dev/accuracy", "dev/best")
    assert set(events.Tags()["scalars"]) == {f"rationale/{name}" for name in figures}
    (event,) = events.Scalars("rationale/loss")
    assert (event.step, event.value) == (3, 0.5)


def judge(rates, target: float = 0.1) -> Watch:
    """A watch over windows of three readings that has seen these."""
    config = toy_config(selection={"target": target, "budget": None}, stages={"collapse_window": 60})
    watch = Watch("rationale", config, 20)
    for reading, rate in enumerate(rates, 1):
        watch.judge(20 * reading, {"selection_rate": rate})
    return watch


@pytest.mark.parametrize("figures", [{"loss": float("nan")}, {"loss": 1.0, "penalty": float("inf")}])
def test_what_is_not_finite_ends_the_run(figures):
    with pytest.raises(TrainingError, match=r"rationale: diverged, (loss is nan|penalty is inf) at step 40; fix:"):
        judge([]).judge(40, figures)


@pytest.mark.parametrize(("rate", "fix"), [(0.0, "smaller"), (0.004, "smaller"), (0.96, "larger"), (1.0, "larger")])
def test_a_whole_window_of_nothing_or_everything_ends_the_run(rate, fix):
    watch = judge([0.1, rate, rate])
    assert not watch.healthy
    match = f"collapsed, the selector keeps {rate:.2%}.*at step 80 .target 10.00%.; fix: a {fix} selection.weight"
    with pytest.raises(TrainingError, match=match):
        watch.judge(80, {"selection_rate": rate})


@pytest.mark.parametrize(
    ("rates", "target"), [([1.0, 1.0, 0.5, 0.0, 0.0, 0.02, 0.0, 0.0, 0.1, 0.09], 0.1), ([1.0] * 9, 0.95), ([], 0.1)]
)
def test_a_way_through_the_extremes_is_no_collapse(rates, target):
    assert judge(rates, target).healthy


def offered(metric: str, *values: tuple[float, float, float], rationales: bool = True) -> list[bool]:
    """Which of (accuracy, macro-F1, L_RE) were better than all before."""
    best, more = Best(metric), {"selection_rate": 0.1} if rationales else {}
    names = "accuracy", "macro_f1", "extraction_loss"
    return [best.offer(i, dict(zip(names, each, strict=True)) | more, {}) for i, each in enumerate(values)]


def test_the_configured_metric_decides_and_the_loss_between_equals():
    values = (0.5, 0.5, 1.0), (0.6, 0.5, 2.0), (0.6, 0.6, 2.0), (0.6, 0.6, 1.9), (0.5, 0.6, 1.8)
    assert offered("accuracy", *values) == [True, True, False, True, False]
    assert offered("macro_f1", *values) == [True, False, True, True, True]


def test_the_paper_s_metric_rounds_and_lets_the_later_of_equals_win():
    def losses(*values: float):
        return [(0, 0, value) for value in values]

    assert offered("extraction_loss", *losses(0.5004, 0.5001, 0.5012, 0.4996)) == [True, True, False, True]
    assert offered("extraction_loss", *losses(float("nan"), 0.3)) == [False, True]
    # a classifier's losses are not rounded
    assert offered("extraction_loss", *losses(0.5001, 0.5004, 0.5001), rationales=False) == [True, False, True]
