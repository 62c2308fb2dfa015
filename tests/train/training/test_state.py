"""Saved states: whole or not at all, only for the run they are of; a killed run goes on exactly where it was saved."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import Recorder, toy_config, toy_images, toy_texts

from rekd_train.errors import ConfigError, TrainingError
from rekd_train.training.stages import fit
from rekd_train.training.state import Snapshot, StateStore, identity_of

STAGES = {"classifier_epochs": 2, "rationale_epochs": 2, "compact_epochs": 1, "save_every": 5}


def store_for(path, **changes) -> StateStore:
    _, train, dev = toy_texts()
    return StateStore(path, identity_of(toy_config(**changes), train, dev, teacher=None))


def test_a_state_comes_back_as_it_was(tmp_path):
    store = store_for(tmp_path)
    assert store.load() is None
    store.save(Snapshot(stage=2, step=7, pair={"w": torch.arange(3)}, progress={"rates": [0.5]}))
    found = store.load()
    assert (found.stage, found.step, found.progress) == (2, 7, {"rates": [0.5]})
    assert torch.equal(found.pair["w"], torch.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"], "nothing is left lying about"
    (tmp_path / ".state.pt.123").write_bytes(b"half written when it was killed")
    assert store.load().step == 7
    store.discard()
    assert store.load() is None and not list(tmp_path.iterdir())


def test_a_state_of_another_run_is_refused_and_says_why(tmp_path):
    store_for(tmp_path).save(Snapshot())
    with pytest.raises(ConfigError, match=r"another run: config\.seed, config\.stages\.rationale_epochs differ"):
        store_for(tmp_path, seed=9, stages={"rationale_epochs": 7}).load()
    _, _, dev = toy_texts()
    with pytest.raises(ConfigError, match="data differ"):
        StateStore(tmp_path, identity_of(toy_config(), toy_texts(examples=40)[1], dev, teacher=None)).load()


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_other_content_of_the_same_length_is_other_data(make):
    _, train, dev = make(examples=600)
    before = identity_of(toy_config(), train, dev)["data"]
    assert before == identity_of(toy_config(), *make(examples=600)[1:])["data"]
    last = train.pixels[-1] if make is toy_images else train._ids[-1]
    last[1] = last[2]
    assert identity_of(toy_config(), train, dev)["data"] != before


def test_what_the_advice_names_may_change(tmp_path):
    store_for(tmp_path).save(Snapshot(step=3))
    changed = {"optimisation": {"learning_rate": 1e-5, "gradient_clip": 0.1}, "selection": {"weight": 5.0}}
    assert store_for(tmp_path, **changed).load().step == 3


def test_a_state_with_a_setting_that_is_gone_goes_on(tmp_path):
    store = store_for(tmp_path)
    store.save(Snapshot(step=3))
    content = torch.load(store.path)
    content["identity"]["config"]["stages"]["operator"] = "zero"
    torch.save(content, store.path)
    assert store.load().step == 3


@pytest.mark.parametrize("damage", [b"", b"not a state", None])
def test_a_damaged_state_is_named(damage, tmp_path):
    store = store_for(tmp_path)
    store.save(Snapshot(pair={"w": torch.zeros(1000)}))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:2000] if damage is None else damage)
    with pytest.raises(TrainingError, match=r"state\.pt cannot be read .*fix: --overwrite instead of --resume"):
        store.load()


@pytest.mark.parametrize("by", ["file", "torch"])
def test_a_full_disk_leaves_the_old_state(by, tmp_path, monkeypatch):
    store = store_for(tmp_path)
    store.save(Snapshot(step=1))

    def full(content, file):
        file.write(b"half a sta")
        if by == "torch":
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    reason = r"cannot be written \(.*No space left on device; 0 MB are free\).*intact; fix: make room"
    with pytest.raises(TrainingError, match=reason) as caught:
        store.save(Snapshot(step=2))
    assert "Pytorch" not in str(caught.value)
    monkeypatch.undo()
    assert store.load().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_diverging_run_leaves_its_last_good_state_and_goes_on_from_it(tmp_path):
    """The weights turn bad in step 10, which is to be saved: it is not."""

    class Saboteur(Recorder):
        def step(self, values):
            super().step(values)
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 10:
                with torch.no_grad():
                    pair.predictor.head[-1].bias.fill_(float("nan"))

    pair, train, dev = toy_texts()
    store = store_for(tmp_path, stages=STAGES)
    with pytest.raises(TrainingError, match=r"diverged.*last good state is in .*state\.pt.*--resume"):
        fit(toy_config(stages=STAGES), pair, train, dev, store=store, observer=Saboteur())
    assert store.load().step == 5
    pair, train, dev = toy_texts(seed=8)
    log = Recorder()
    changed = {"stages": STAGES, "optimisation": {"learning_rate": 1e-3, "embedding_learning_rate": 2e-3}}
    fit(toy_config(**changed), pair, train, dev, store=store_for(tmp_path, **changed), resume=True, observer=log)
    assert log.stages[0] == ("classifier", 16, 5)
    assert all(parameter.isfinite().all() for parameter in pair.parameters())


def test_a_finished_run_goes_straight_to_its_end(tmp_path):
    pair, train, dev = toy_texts()
    store = store_for(tmp_path, stages=STAGES)
    fit(toy_config(stages=STAGES), pair, train, dev, store=store)
    again, *_ = toy_texts(seed=3)
    log = Recorder()
    fit(toy_config(stages=STAGES), again, train, dev, store=store, resume=True, observer=log)
    assert not log.stages and again.policy == pair.policy
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), again.parameters(), strict=True))


SCRIPT = Path(__file__).with_name("toy_run.py")
CONFIG = {
    "stages": {
        "classifier_epochs": 2, "rationale_epochs": 3, "compact_epochs": 2, "save_every": 7, "evaluate_every": 1,
    }
}  # fmt: skip


def run(task: dict, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(task)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("whole") / "run.pt"
    done = run({"output": str(output), "config": CONFIG, "teacher": True})
    assert done.returncode == 0, done.stderr
    return torch.load(output)


@pytest.mark.parametrize("kill", [("distillation", 18), ("compact", 3), ("classifier", 15)])
def test_killed_and_resumed_equals_uninterrupted(kill, uninterrupted, tmp_path):
    task = {"output": str(tmp_path / "run.pt"), "state": str(tmp_path / "state"), "config": CONFIG, "teacher": True}
    killed = run({**task, "kill": kill})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run.pt").exists()
    resumed = run({**task, "resume": True})
    assert resumed.returncode == 0, resumed.stderr
    result = torch.load(tmp_path / "run.pt")
    stage, _, start = result["stages"][0]
    assert stage == kill[0] and start == kill[1] // 7 * 7, "goes on from the last save, not from the beginning"
    assert result["policy"] == uninterrupted["policy"]
    assert result["pair"].keys() == uninterrupted["pair"].keys()
    for name, tensor in uninterrupted["pair"].items():
        assert torch.equal(result["pair"][name], tensor), name
