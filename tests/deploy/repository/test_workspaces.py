"""Folders of one process: gone when it ends, cleared away if it was killed, never taken from a living one."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository import workspaces
from rekd_deploy.repository.workspaces import (
    Workspace,
    one_at_a_time,
    refuse_unwritable_place,
    remove_leftovers,
    replacing,
)

_KILLED = """
import os, sys
from pathlib import Path
from rekd_deploy.repository.workspaces import Workspace
space = Workspace("rekd-test-", Path(sys.argv[1]))
os._exit(1)
"""


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_what_a_killed_process_left_is_cleared_away_and_what_is_in_use_or_not_ours_stays(tmp_path):
    (tmp_path / "rekd-test-by-hand").mkdir()
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False)
    assert len(listing(tmp_path)) == 2
    with Workspace("rekd-test-", tmp_path) as space:
        (space.path / "file").touch()
        assert listing(tmp_path) == sorted(["rekd-test-by-hand", space.path.name])
        assert remove_leftovers(tmp_path, "rekd-test-") == [] and space.path.is_dir()
    assert listing(tmp_path) == ["rekd-test-by-hand"]
    space.close()


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


def test_what_was_moved_aside_by_a_killed_process_comes_back(tmp_path):
    aside = tmp_path / ".target-rekd-x" / "old"
    aside.mkdir(parents=True)
    (aside / "precious").touch()
    with pytest.raises(ValueError, match="stop"), replacing(tmp_path / "target"):
        raise ValueError("stop")
    assert (tmp_path / "target" / "precious").is_file()


def test_one_process_at_a_time_writes_at_a_place(tmp_path):
    entered = threading.Event()

    def second():
        with one_at_a_time(tmp_path / "link" / "models"):
            entered.set()

    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with one_at_a_time(tmp_path / "disk" / "models"):
        other = threading.Thread(target=second)
        other.start()
        assert not entered.wait(0.3)
    other.join(10)
    assert entered.is_set() and listing(tmp_path / "disk") == []


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    refuse_unwritable_place(tmp_path / "new" / "models")
    (tmp_path / "file").touch()
    with pytest.raises(RepositoryError, match=r"models cannot be written, since .*/file is a file; fix"):
        refuse_unwritable_place(tmp_path / "file" / "models")
    monkeypatch.setattr(workspaces.os, "access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(RepositoryError, match=f"since {tmp_path} is read-only here; fix: choose another --output"):
        refuse_unwritable_place(tmp_path / "new" / "models")
