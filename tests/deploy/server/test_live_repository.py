"""What a reloading server reads, and which export may take another's place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import CONFIG_FILE, ServingSettings, read_config
from rekd_deploy.repository.manifest import Versions, pin_versions
from rekd_deploy.repository.text_endpoint import endpoint_configs
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server import live_repository
from rekd_deploy.server.live_repository import LiveRepository, Snapshot, reasons_not_to_exchange


@pytest.fixture
def exported(artefacts, tmp_path):
    """A function: number -> the repository with one more export, which differs by that number."""
    root = tmp_path / "exported"

    def export(number, **settings):
        named = replace(artefacts, manifest={**artefacts.manifest, "checkpoint_sha256": f"{number:064}"})
        return write_repository(named, root, **settings)

    return export


@pytest.fixture
def live(exported):
    live = LiveRepository(exported(1))
    live.prepare()
    yield live
    live.close()


def served(root):
    """Model -> versions that its configuration serves, and that lie there."""
    found = {}
    for folder in root.iterdir():
        policy = read_config(folder / CONFIG_FILE).version_policy.specific.versions
        found[folder.name] = (list(policy), sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit()))
    return found


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_prepared_as_exported_but_with_the_newest_version_alone(live, exported):
    live.close()
    exported(2, keep=2)
    root, manifest = live.prepare()
    assert root != live.repository and manifest["repository"]["model_version"] == 2
    assert served(live.models) == dict.fromkeys(("rekd", "rekd_selector", "rekd_predictor"), ([2], [2]))
    steps = read_config(live.models / "rekd" / CONFIG_FILE).ensemble_scheduling.step
    assert [step.model_version for step in steps] == [2, 2]


def test_what_versions_share_is_there_and_stays_while_it_is_the_same(live, exported):
    shared = {path: path.stat().st_ino for path in live.models.rglob("*") if {"labels.txt", "warmup"} & set(path.parts)}
    assert any(path.name == "labels.txt" for path in shared) and any("warmup" in path.parts for path in shared)
    exported(2)
    live.place(live.snapshot())
    assert {path: path.stat().st_ino for path in shared} == shared, "Triton would load every version again"
    (live.models / "rekd" / "labels.txt").write_text("other")
    exported(3)
    new = live.snapshot()
    live.place(new)
    assert (live.models / "rekd" / "labels.txt").read_text() == (new.root / "rekd" / "labels.txt").read_text()


def test_python_writes_no_bytecode_beside_a_model(live):
    """Triton would take it for a change of that version."""
    folder = live.models / "rekd_selector" / "1"
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    code = "import model; print(model.__cached__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "__pycache__" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_an_export_changes_nothing_that_is_read(live, exported):
    before = contents(live.models)
    exported(2)
    assert live.published()["repository"]["model_version"] == 2
    shutil.rmtree(live.repository)
    assert live.published() is None and contents(live.models) == before


def test_two_versions_beside_each_other_and_one_again(live, exported):
    exported(2)
    old, new = live.current, live.snapshot()
    live.place(new)
    assert {tuple(folders) for _, folders in served(live.models).values()} == {(1, 2)}
    path = live.models / "rekd_selector" / CONFIG_FILE
    alone = read_config(path)
    live.configure(old, "rekd_selector", (2,))
    both = read_config(path)
    assert list(both.version_policy.specific.versions) == [1, 2]
    both.version_policy.CopyFrom(alone.version_policy)
    assert both == alone
    live.current = new
    live.remove(old)
    assert {tuple(folders) for _, folders in served(live.models).values()} == {(2,)} and not old.root.exists()


def test_a_restart_takes_up_what_was_served_last(live, exported):
    exported(2)
    new = live.snapshot()
    live.place(new)  # and then the server died
    live.prepare()
    assert served(live.models)["rekd_selector"] == ([1], [1]) and not new.root.exists()


def test_an_exchange_while_it_is_read_is_noticed(live, exported, monkeypatch):
    def look_away(source, target):
        exported(2)
        raise FileNotFoundError(source)

    monkeypatch.setattr(live_repository.shutil, "copytree", look_away)
    with pytest.raises(RepositoryError, match="changed while it was read"):
        live.snapshot()
    monkeypatch.undo()
    assert live.snapshot().version == 2


def test_closing_leaves_nothing(live):
    folder = live.models.parent
    live.close()
    live.close()
    assert not folder.exists() and live.current is None


# which export may take another's place


@pytest.fixture
def snapshot(artefacts):
    """A function: version -> a snapshot in memory, with the text endpoint."""

    def made(version, **settings):
        chosen = ServingSettings(**settings)
        configs = {**build_configs(artefacts, chosen, "python"), **endpoint_configs(artefacts, chosen)}
        pin_versions(configs, Versions(version))
        found = Snapshot(Path(), {"repository": {"model_version": version}})
        found.__dict__["configs"] = configs
        return found

    return made


def test_the_next_version_with_other_batching_and_larger_requests_may(snapshot):
    new = snapshot(2, max_batch_size=128, preferred_batch_sizes=(4,), queue_delay_us=7, instances=2, threads=3)
    assert reasons_not_to_exchange(snapshot(1), new) == []
    assert set(new.ensembles) == {"rekd", "rekd_text"}


def test_a_further_model_may_come_but_none_may_go(snapshot):
    few, many = snapshot(1), snapshot(2)
    few.__dict__["configs"] = {name: config for name, config in few.configs.items() if name != "rekd_text"}
    assert reasons_not_to_exchange(few, many) == []
    few.manifest["repository"]["model_version"] = 3
    assert reasons_not_to_exchange(many, few) == ["it lacks rekd_text"]


@pytest.mark.parametrize(
    ("model", "change", "reason"),
    [
        ("rekd_predictor", lambda config: config.output[0].dims.append(3), "rekd_predictor differs in output"),
        ("rekd_prepare", lambda config: setattr(config, "backend", "other"), "rekd_prepare differs in backend"),
        ("rekd", lambda config: config.output[0].dims.append(3), "rekd differs in output"),
        ("rekd", lambda config: setattr(config, "max_batch_size", 32), "rekd takes 32 in a request, 64 until now"),
        ("rekd", lambda config: change_parameter(config, "labels", '["good", "bad"]'), "its labels or"),
        ("rekd", lambda config: change_parameter(config, "preprocessing_sha256", "0" * 64), "its labels or"),
    ],
)
def test_what_clients_or_triton_rely_on_may_not_change(snapshot, model, change, reason):
    new = snapshot(2)
    change(new.configs[model])
    (found,) = reasons_not_to_exchange(snapshot(1), new)
    assert reason in found


def change_parameter(config, name, value):
    assert config.parameters[name].string_value not in ("", value)
    config.parameters[name].string_value = value
