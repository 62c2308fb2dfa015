"""Finished stages of the demo are kept, unfinished ones are not."""

import pytest
from conftest import raising

from rekd_deploy.cli.demo_chain import Demo, Stages, run_demo, source_hash
from rekd_train.training.state import Observer


@pytest.fixture
def made(tmp_path):
    """Runs the stage 'a' anew or not; returns whether it was made. ``fail`` interrupts it."""
    def run(inputs, fail=None) -> bool:
        heard, calls = [], []
        def make(directory):
            calls.append(directory)
            directory.mkdir(exist_ok=True)  # the worst case: something is there already
            if fail:
                raise fail
        stages = Stages(tmp_path, lambda name, reused: heard.append((name, reused)))
        assert stages.run("a", inputs, make) == tmp_path / "a" and stages.seconds["a"] >= 0
        assert heard == [("a", not calls)]
        return bool(calls)
    return run


def test_a_stage_runs_again_when_inputs_or_sources_change_it_is_gone_or_was_interrupted(made, tmp_path, monkeypatch):
    keys, again = [], []
    for x in (1, 1, 2):  # by its key a later stage knows
        again.append(made({"x": x}))
        keys.append(Stages(tmp_path).key("a"))
    assert again == [True, False, True] and keys[0] == keys[1] != keys[2]
    (tmp_path / "a").rmdir()
    assert made({"x": 2})
    (tmp_path / "one.py").write_text("x = 1")
    before = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert source_hash(tmp_path) == before
    (tmp_path / "one.py").rename(tmp_path / "two.py")
    assert source_hash(tmp_path) != before
    for interruption in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(interruption):
            made({"x": 3}, fail=interruption)
        assert made({"x": 2}), "one that is interrupted is not finished"
    monkeypatch.setattr("rekd_train.runs.train_run", trained := raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_demo(Demo(tmp_path), Stages(tmp_path), Observer())
    assert trained.call_args.kwargs["overwrite"] is True, "what lies there was made from other inputs"
