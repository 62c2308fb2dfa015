"""Finished stages are kept, unfinished ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from rekd_deploy.cli.stages import Stages, source_hash


def writer(calls: list[str], name: str):
    def make(directory: Path) -> None:
        calls.append(name)
        directory.mkdir(exist_ok=True)
        (directory / "result").write_text(name)

    return make


def test_a_finished_stage_is_reused_with_its_seconds(tmp_path):
    calls: list[str] = []
    first = Stages(tmp_path)
    first.run("a", {"x": 1}, writer(calls, "a"))
    second = Stages(tmp_path)
    assert second.run("a", {"x": 1}, writer(calls, "again")) == tmp_path / "a"
    assert calls == ["a"]
    assert second.seconds == first.seconds


def test_other_inputs_make_it_run_again(tmp_path):
    calls: list[str] = []
    Stages(tmp_path).run("a", {"x": 1}, writer(calls, "a"))
    Stages(tmp_path).run("a", {"x": 2}, writer(calls, "b"))
    assert calls == ["a", "b"]


def test_a_later_stage_runs_again_when_an_earlier_one_changed(tmp_path):
    calls: list[str] = []
    for x in (1, 1, 2):
        stages = Stages(tmp_path)
        stages.run("first", x, writer(calls, "first"))
        stages.run("second", stages.key("first"), writer(calls, "second"))
    assert calls == ["first", "second", "first", "second"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_stage_is_not_finished(tmp_path, interruption):
    def interrupted(directory: Path) -> None:
        directory.mkdir(exist_ok=True)  # the worst case: something is there already
        raise interruption

    calls: list[str] = []
    Stages(tmp_path).run("a", 1, writer(calls, "old"))
    with pytest.raises(interruption):
        Stages(tmp_path).run("a", 2, interrupted)
    Stages(tmp_path).run("a", 1, writer(calls, "new"))
    assert calls == ["old", "new"]


def test_a_stage_whose_directory_is_gone_runs_again(tmp_path):
    calls: list[str] = []
    Stages(tmp_path).run("a", 1, writer(calls, "a"))
    (tmp_path / "a" / "result").unlink()
    (tmp_path / "a").rmdir()
    Stages(tmp_path).run("a", 1, writer(calls, "b"))
    assert calls == ["a", "b"]


def test_announcements_say_what_is_reused(tmp_path):
    heard: list[tuple[str, bool]] = []
    for _ in range(2):
        Stages(tmp_path, lambda name, reused: heard.append((name, reused))).run("a", 1, writer([], "a"))
    assert heard == [("a", False), ("a", True)]


def test_source_hash_follows_content_and_names(tmp_path):
    (tmp_path / "one.py").write_text("x = 1")
    before = source_hash([tmp_path])
    assert source_hash([tmp_path]) == before
    (tmp_path / "notes.txt").write_text("not code")
    assert source_hash([tmp_path]) == before
    (tmp_path / "one.py").rename(tmp_path / "two.py")
    assert source_hash([tmp_path]) != before
