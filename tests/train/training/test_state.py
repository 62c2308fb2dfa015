"""Saved states: whole or not at all, and only for the run they are of."""

from __future__ import annotations

import errno
import shutil
from types import SimpleNamespace

import pytest
import torch
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


def test_a_state_of_another_run_or_of_other_data_is_refused_and_says_why(tmp_path):
    store_for(tmp_path).save(Snapshot())
    with pytest.raises(ConfigError, match=r"another run: config\.seed, config\.stages\.rationale_epochs differ"):
        store_for(tmp_path, seed=9, stages={"rationale_epochs": 7}).load()
    for make in (toy_texts, toy_images):
        _, train, dev = make(examples=600)
        digests = [identity_of(toy_config(), train, dev)["data"]]
        assert digests == [identity_of(toy_config(), *make(examples=600)[1:])["data"]]
        for index in (0, -1):
            example = (train.pixels if make is toy_images else train.ids)[index]
            example[1] = example[2]
            digests.append(identity_of(toy_config(), train, dev)["data"])
        assert len(set(digests)) == 3, "other content of the same length"
    with pytest.raises(ConfigError, match="data differ"):
        StateStore(tmp_path, identity_of(toy_config(), train, dev, teacher=None)).load()


def test_what_the_advice_names_may_change_and_what_is_gone_may_be_recorded(tmp_path):
    store = store_for(tmp_path)
    store.save(Snapshot(step=3))
    content = torch.load(store.path)
    content["identity"]["config"]["stages"]["operator"] = "zero"
    content["identity"]["config"]["acceleration"]["gather"] = True
    torch.save(content, store.path)
    rates = {"learning_rate": 1e-5, "head_learning_rate": 1e-4, "selector_learning_rate": 1e-4}
    changed = {"optimisation": rates | {"gradient_clip": 0.1}, "selection": {"weight": 5.0}}
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
            self.steps += 1
            if self.steps == 10:
                pair.predictor.head[-1].bias.data.fill_(float("nan"))

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
