"""Saved states: whole or not at all, only for the run they are of; a killed run goes on exactly where it was saved."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import toy_run
from toys import Recorder, toy_config, toy_images, toy_texts

from rekd_train.errors import ConfigError, TrainingError
from rekd_train.training.stages import fit
from rekd_train.training.state import Snapshot, StateStore, identity_of

pytestmark = pytest.mark.slow

STAGES = {"classifier_epochs": 2, "rationale_epochs": 2, "compact_epochs": 1, "save_every": 5}


def store_for(path, **changes) -> StateStore:
    _, train, dev = toy_texts()
    return StateStore(path, identity_of(toy_config(**changes), train, dev, teacher=None))


def test_a_state_comes_back_as_it_was(tmp_path):
    store = store_for(tmp_path)
    assert store.load() is None
    store.save(Snapshot(stage=2, step=7, pair={"w": torch.arange(3)}, progress={"rates": [0.5]}))
    (tmp_path / ".state.pt.123").write_bytes(b"half written when it was killed")
    found = store.load()
    assert (found.stage, found.step, found.progress) == (2, 7, {"rates": [0.5]})
    assert torch.equal(found.pair["w"], torch.arange(3))
    store.discard()
    assert store.load() is None and not list(tmp_path.iterdir()), "nothing is left lying about"


def test_a_state_of_another_run_is_refused_and_says_why(tmp_path):
    store_for(tmp_path).save(Snapshot())
    with pytest.raises(ConfigError, match=r"another run: config\.seed, config\.stages\.rationale_epochs differ"):
        store_for(tmp_path, seed=9, stages={"rationale_epochs": 7}).load()
    _, train, dev = toy_texts(examples=40)
    with pytest.raises(ConfigError, match="data differ"):
        StateStore(tmp_path, identity_of(toy_config(), train, dev, teacher=None)).load()


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_other_content_of_the_same_length_is_other_data(make):
    _, train, dev = make(examples=600)
    before = identity_of(toy_config(), train, dev)["data"]
    assert before == identity_of(toy_config(), *make(examples=600)[1:])["data"]
    last = train.pixels[-1] if make is toy_images else train.ids[-1]
    last[1] = last[2]
    assert identity_of(toy_config(), train, dev)["data"] != before


def test_what_the_advice_names_may_change_and_what_is_gone_may_be_recorded(tmp_path):
    store = store_for(tmp_path)
    store.save(Snapshot(step=3))
    content = torch.load(store.path)
    content["identity"]["config"]["stages"]["operator"] = "zero"
    content["identity"]["config"]["acceleration"]["gather"] = True
    torch.save(content, store.path)
    changed = {"optimisation": {"learning_rate": 1e-5, "gradient_clip": 0.1}, "selection": {"weight": 5.0}}
    assert store_for(tmp_path, **changed).load().step == 3


@pytest.mark.parametrize("damage", [b"", b"not a state", None])
def test_a_damaged_state_is_named(damage, tmp_path):
    store = store_for(tmp_path)
    store.save(Snapshot(pair={"w": torch.zeros(1000)}))
    store.path.write_bytes(store.path.read_bytes()[:2000] if damage is None else damage)
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
    reason = r"cannot be written \((?!.*Pytorch).*No space left on device; 0 MB are free\).*intact; fix: make room"
    with pytest.raises(TrainingError, match=reason):
        store.save(Snapshot(step=2))
    assert store.load().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_diverging_run_leaves_its_last_good_state_and_goes_on_from_it(tmp_path):
    """The weights turn bad in step 10, which is to be saved: it is not."""

    class Saboteur(Recorder):
        steps = 0

        def step(self, values):
            super().step(values)
            self.steps += 1
            if self.steps == 10:
                with torch.no_grad():
                    pair.predictor.head[-1].bias.fill_(float("nan"))

    pair, train, dev = toy_texts()
    store = store_for(tmp_path, stages=STAGES)
    with pytest.raises(TrainingError, match=r"diverged.*last good state is in .*state\.pt.*--resume"):
        fit(toy_config(stages=STAGES), pair, train, dev, store=store, observer=Saboteur())
    assert store.load().step == 5
    pair, log = toy_texts(seed=8)[0], Recorder()
    changed = {"stages": STAGES, "optimisation": {"learning_rate": 1e-3, "embedding_learning_rate": 2e-3}}
    fit(toy_config(**changed), pair, train, dev, store=store_for(tmp_path, **changed), resume=True, observer=log)
    assert log.stages[0] == ("classifier", 16, 5)
    assert all(parameter.isfinite().all() for parameter in pair.parameters())


CONFIG = {
    "stages": {
        "classifier_epochs": 2, "rationale_epochs": 3, "compact_epochs": 2, "save_every": 7, "evaluate_every": 1,
    }
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted() -> dict:
    return toy_run.run({"config": CONFIG, "teacher": True})


@pytest.mark.parametrize("kill", [("distillation", 18), ("compact", 3), ("classifier", 15)])
def test_killed_and_resumed_equals_uninterrupted(kill, uninterrupted, tmp_path):
    task = {"state": str(tmp_path), "config": CONFIG, "teacher": True}
    command = [sys.executable, toy_run.__file__, json.dumps({**task, "kill": kill})]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for starts_at in ([(kill[0], kill[1] // 7 * 7)], []):  # the last save; then the end, which is saved, too
        result = toy_run.run({**task, "resume": True})
        assert [(stage, start) for stage, _, start in result["stages"]][:1] == starts_at
        assert result["policy"] == uninterrupted["policy"]
        torch.testing.assert_close(result["pair"], uninterrupted["pair"], rtol=0, atol=0)
