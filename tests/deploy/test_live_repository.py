"""What a reloading server reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import CONFIG_FILE, read_config
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.live_repository import LiveRepository


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
    yield live
    live.close()


def served(root):
    """Model -> versions that its configuration serves, and that lie there."""
    found = {}
    for folder in root.iterdir():
        policy = read_config(folder / CONFIG_FILE).version_policy.specific.versions
        found[folder.name] = (list(policy), sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit()))
    return found


def test_prepared_as_exported_but_with_the_newest_version_alone(live, exported):
    exported(2, keep=2)
    root, manifest = live.prepare()
    assert root != live.repository and manifest["repository"]["model_version"] == 2
    assert served(live.models) == dict.fromkeys(("rekd", "rekd_selector", "rekd_predictor"), ([2], [2]))
    steps = read_config(live.models / "rekd" / CONFIG_FILE).ensemble_scheduling.step
    assert [step.model_version for step in steps] == [2, 2]


def test_what_versions_share_is_there_and_stays_while_it_is_the_same(live, exported):
    live.prepare()
    shared = {path: path.stat().st_ino for path in live.models.rglob("*") if {"labels.txt", "warmup"} & set(path.parts)}
    assert any(path.name == "labels.txt" for path in shared) and any("warmup" in path.parts for path in shared)
    exported(2)
    live.place(live.snapshot())
    assert {path: path.stat().st_ino for path in shared} == shared, "Triton would load every version again"
    (live.models / "rekd" / "labels.txt").unlink()
    (live.models / "rekd" / "labels.txt").write_text("other")
    exported(3)
    live.place(live.snapshot())
    assert (live.models / "rekd" / "labels.txt").read_text() == "\n".join(live.current.description.labels) + "\n"


def test_python_writes_no_bytecode_beside_a_model(live):
    """Triton would take it for a change of that version."""
    live.prepare()
    folder = live.models / "rekd_selector" / "1"
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    code = "import model; print(model.__cached__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "__pycache__" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_an_export_changes_nothing_that_is_read(live, exported):
    live.prepare()
    before = {path: path.read_bytes() for path in live.models.rglob("*") if path.is_file()}
    stamp = live.stamp()
    exported(2)
    assert live.stamp() != stamp
    shutil.rmtree(live.repository)
    assert live.stamp() is None
    assert {path: path.read_bytes() for path in live.models.rglob("*") if path.is_file()} == before


def test_two_versions_beside_each_other_and_one_again(live, exported):
    live.prepare()
    exported(2)
    old, new = live.current, live.snapshot()
    live.place(new)
    assert {tuple(folders) for _, folders in served(live.models).values()} == {(1, 2)}
    live.current = new
    live.remove(old)
    assert {tuple(folders) for _, folders in served(live.models).values()} == {(2,)} and not old.root.exists()


def test_a_restart_takes_up_what_was_served_last(live, exported):
    live.prepare()
    exported(2)
    live.place(live.snapshot())  # and then the server died
    live.prepare()
    assert served(live.models)["rekd_selector"] == ([1], [1])


def test_damage_is_noticed_before_anything_is_copied(live):
    (live.repository / "rekd_selector" / "1" / "model.onnx").write_bytes(b"other")
    with pytest.raises(RepositoryError, match=r"model\.onnx changed since the export"):
        live.prepare()


def test_an_exchange_while_it_is_read_is_noticed(live, exported, monkeypatch):
    def look_away(folder, names):
        if Path(folder).name == "rekd_predictor":
            exported(2)
        return ()

    monkeypatch.setattr("rekd_deploy.server.live_repository._IGNORED", look_away)
    with pytest.raises(RepositoryError, match="changed while it was read"):
        live.snapshot()
    monkeypatch.undo()
    assert live.snapshot().version == 2


def test_closing_leaves_nothing(live):
    live.prepare()
    folder = live.models.parent
    live.close()
    live.close()
    assert not folder.exists()
    with pytest.raises(RepositoryError, match="has not been copied"):
        _ = live.current
