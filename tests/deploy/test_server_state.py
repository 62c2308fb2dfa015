"""What a running server writes down."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rekd_deploy.server import state as server_state
from rekd_deploy.server.state import ServerState, remove_state, running_states, user_folder, write_state


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def a_state(process_id=None, **changes):
    fields = {
        "process_id": process_id or os.getpid(), "repository": "/r", "grpc_url": "127.0.0.1:1",
        "http_url": "http://127.0.0.1:2", "metrics_url": "http://127.0.0.1:3/metrics", "log_file": "/l", "key": "k",
        "version": 1,
    }  # fmt: skip
    return ServerState(**{**fields, **changes})


def test_written_read_and_removed():
    assert running_states() == []
    write_state(a_state())
    path = write_state(a_state(version=2))
    assert running_states() == [a_state(version=2)]
    assert path.stat().st_mode & 0o777 == 0o600
    remove_state(os.getpid())
    remove_state(os.getpid())
    assert running_states() == [] and list(user_folder().iterdir()) == []


def test_others_can_read_it_at_no_moment(monkeypatch):
    modes = []
    dump = json.dump

    def watched(content, file, **settings):
        modes.append(os.fstat(file.fileno()).st_mode & 0o777)
        dump(content, file, **settings)

    monkeypatch.setattr(server_state.json, "dump", watched)
    write_state(a_state())
    assert modes == [0o600]


def test_what_a_killed_server_left_is_removed():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = write_state(a_state(ended.pid))
    write_state(a_state())
    (user_folder() / "serving-damaged.json").write_text("{")
    assert running_states() == [a_state()] and not path.exists()
