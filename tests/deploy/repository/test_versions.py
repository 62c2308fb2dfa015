"""Numbered versions: a new export stands beside or in place of the old one, and never half of it."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import NO_ROOM, contents, raising
from families import another
from reference_repository import artefacts_of
from servers import wait_until

from rekd_deploy import ExportError, Pipeline, RepositoryError
from rekd_deploy.export.run import publish
from rekd_deploy.repository import workspaces
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import SINGLE, ServingSettings, read_config
from rekd_deploy.repository.manifest import differing_fields
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.repository.workspaces import replacing
from rekd_deploy.repository.writer import write_repository

FULL = raising(NO_ROOM)


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


def folders(root, model):
    return [name for name in listing(root / model) if name.isdigit()]


@pytest.fixture
def root(artefacts, tmp_path):
    return write_repository(artefacts, tmp_path / "r")


@pytest.mark.parametrize("change", [
    {}, {"keep": 3}, {"max_batch_size": 8}, {"keep": 1, "threads": 2}, {"target": "onnxruntime"}])  # fmt: skip
def test_other_settings_are_another_version_and_the_same_export_again_changes_nothing(artefacts, root, change):
    newest = another(artefacts, 2) if change == {"keep": 3} else artefacts
    write_repository(newest, root, **change)
    assert all(folders(root, model)[-1:] == ["2" if change else "1"] for model in ("rekd", "rekd_selector"))
    before, inode = contents(root), root.stat().st_ino
    write_repository(newest, root, **change)
    assert contents(root) == before and root.stat().st_ino == inode


def test_back_to_an_earlier_export_is_the_next_version_with_its_graphs(artefacts, root):
    before = {name: content for name, content in contents(root).items() if "/1/" in name}
    write_repository(another(artefacts, 2), root)
    write_repository(artefacts, root)
    manifest, first = check_repository(root), artefacts.manifest
    assert folders(root, "rekd") == ["3"] and manifest["checkpoint_sha256"] == first["checkpoint_sha256"]
    assert {name.replace("/3/", "/1/"): each for name, each in contents(root).items() if "/3/" in name} == before


@pytest.mark.parametrize(("name", "differing"), [
    ("familiarity", []), ("rekd_version", []), ("labels", ["parameters"]), ("preprocessing_sha256", ["parameters"])])
def test_a_model_that_has_learnt_from_other_texts_may_follow_one_with_other_labels_not(rationalizer, name, differing):
    old, new = (build_configs(artefacts_of(rationalizer, single=True), ServingSettings())[SINGLE] for _ in range(2))
    new.parameters[name].string_value = f"other than {old.parameters[name].string_value}"
    assert len(old.parameters[name].string_value) > 0 and differing_fields(old, new) == differing


def test_keep_leaves_so_many_versions_of_the_component_models(artefacts, root, rationalizer, texts):
    for number in (2, 3, 4):
        write_repository(another(artefacts, number), root, keep=3, max_batch_size=16 * number)
    assert folders(root, "rekd") == ["4"] and folders(root, "rekd_selector") == ["2", "3", "4"]
    selector = read_config(root / "rekd_selector" / "config.pbtxt")
    assert list(selector.version_policy.specific.versions) == [2, 3, 4]
    steps = read_config(root / "rekd" / "config.pbtxt").ensemble_scheduling.step
    assert [(step.model_name, step.model_version) for step in steps] == [("rekd_selector", 4), ("rekd_predictor", 4)]
    described = check_repository(root)["repository"]
    assert described["model_version"] == 4 and sorted(described["earlier"]) == ["2", "3"]
    assert described["earlier"]["3"]["checkpoint_sha256"] == f"{3:064}"
    with Pipeline(root) as pipeline:  # of the newest version
        assert [each.label for each in pipeline.predict(texts)] == [each.label for each in rationalizer.predict(texts)]
    with pytest.raises(RepositoryError, match=r"versions of rekd_selector cannot stay .* backend.*fix: --keep 1"):
        write_repository(another(artefacts, 5), root, keep=2, target="onnxruntime")
    write_repository(another(artefacts, 4), root, keep=1, max_batch_size=64)
    assert folders(root, "rekd_predictor") == ["5"] and check_repository(root)["repository"]["earlier"] == {}


def test_a_damaged_version_is_not_kept_but_replaced(artefacts, root):
    (root / "rekd_selector" / "1" / "model.onnx").write_bytes(b"")
    with pytest.raises(RepositoryError, match="rekd_selector/1/model.onnx changed"):
        write_repository(another(artefacts, 2), root, keep=2)
    assert folders(root, "rekd") == ["1"]
    write_repository(another(artefacts, 2), root)
    check_repository(root)


def test_a_full_disk_in_the_middle_leaves_the_old_repository_and_is_one_line_with_its_fix(
    artefacts, checkpoint, root, tmp_path, monkeypatch):
    before = contents(root)
    with monkeypatch.context() as patch:
        patch.setattr("rekd_deploy.repository.writer.write_json", FULL)
        with pytest.raises(OSError, match="No space"):
            write_repository(another(artefacts, 2), root, keep=2)
    monkeypatch.setattr("rekd_deploy.export.graphs.export", lambda *a, **k: another(artefacts, 2))
    monkeypatch.setattr("rekd_deploy.repository.writer.shutil.copyfile", FULL)
    with pytest.raises(ExportError, match=r"no room for the export at .*/r: No space left.*fix: free some space"):
        publish(checkpoint, root)
    monkeypatch.setattr("rekd_deploy.export.graphs.export", FULL)
    with pytest.raises(ExportError, match="no room for the export at .*TMPDIR"):
        publish(checkpoint, root)
    assert contents(root) == before and listing(tmp_path) == ["r"]


_WRITER = """
import sys, time
from pathlib import Path
from rekd_deploy.repository.workspaces import replacing
with replacing(Path(sys.argv[1])) as work:
    (work / "half").write_text("half")
    print(work, flush=True)
    time.sleep(60)
"""


def test_killed_outright_it_leaves_the_old_repository_and_the_next_export_clears_up(artefacts, root, tmp_path):
    (tmp_path / ".r-rekd-by-hand").mkdir()  # looks like one of ours
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(root)], stdout=subprocess.PIPE, text=True) as process:
        left, before = Path(process.stdout.readline().strip()).parent, contents(root)
        write_repository(artefacts, root)
        workspaces.remove_leftovers(tmp_path, ".r-rekd-")
        assert left.is_dir(), "the other one is at work"
        process.kill()
    assert contents(root) == before
    write_repository(another(artefacts, 2), root)
    wait_until(lambda: listing(tmp_path) == [".r-rekd-by-hand", "r"])  # the lock goes in its own time
    check_repository(root)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_directory_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(workspaces, "_exchanged", lambda one, other: False)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/current")  # where it leads is replaced, and it stays
    for target in (tmp_path / "link", tmp_path / "disk" / "current"):
        for content in ("first", "second"):
            with replacing(target) as work:
                (work / content).touch()
            assert listing(target) == [content] and listing(tmp_path / "disk") == ["current"]
            assert listing(tmp_path) == ["disk", "link"] and (tmp_path / "link").is_symlink()
    with pytest.raises(ValueError, match="stop"), replacing(target) as work:
        (work / "third").touch()
        raise ValueError("stop")
    assert listing(target) == ["second"] and listing(tmp_path / "disk") == ["current"]
    (tmp_path / ".lost-rekd-x").mkdir()
    target.rename(tmp_path / ".lost-rekd-x" / "old")  # moved aside by a killed process, it comes back
    with pytest.raises(ValueError, match="stop"), replacing(tmp_path / "lost"):
        raise ValueError("stop")
    assert listing(tmp_path / "lost") == ["second"]


def test_one_process_at_a_time_writes_at_a_place_and_one_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def second():
        with workspaces.one_at_a_time(tmp_path / "link" / "models"):
            return listing(tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with ThreadPoolExecutor(1) as pool:
        with workspaces.one_at_a_time(tmp_path / "disk" / "models"):
            other = pool.submit(second)
            time.sleep(0.3)
            assert not other.done()
        assert other.result(10) == []
    workspaces.refuse_unwritable_place(tmp_path / "new" / "models")
    (tmp_path / "file").touch()
    with pytest.raises(RepositoryError, match=r"models cannot be written, since .*/file is a file; fix"):
        workspaces.refuse_unwritable_place(tmp_path / "file" / "models")
    monkeypatch.setattr(workspaces.os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(RepositoryError, match=f"since {tmp_path} is read-only here; fix: choose another --output"):
        workspaces.refuse_unwritable_place(tmp_path / "new" / "models")
