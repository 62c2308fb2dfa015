"""A server that is looked after, with a script in Triton's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from servers import READY, FakeTriton, wait_until

from rekd_deploy.errors import ServerError
from rekd_deploy.server import service
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.service import Service
from rekd_deploy.server.status import ServerState, remove_state, running_states, user_folder, write_state


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(service, "_FIRST_PAUSE", 0.05)


@pytest.fixture
def server(repository, tmp_path):
    program = FakeTriton(tmp_path, "print('the first of them', flush=True)\n" + READY)
    return TritonServer(repository, 0, 0, 0, log_file=tmp_path / "log", program=program)


@pytest.fixture
def running(server):
    """A function: limit of restarts -> the service in a thread of its own, ready; its lines; its errors."""
    stopped, threads = threading.Event(), []

    def begun(limit):
        lines, errors, ready = [], [], threading.Event()

        def work():
            try:
                Service(server, limit, lines.append).run(ready.set, stopped)
            except ServerError as error:
                errors.append(error)

        threads.append(threading.Thread(target=work))
        threads[0].start()
        assert ready.wait(20)
        return threads[0], lines, errors

    yield begun
    stopped.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert server.process_id is None and running_states() == []


def test_a_death_ends_the_service_with_a_word(running, server):
    thread, lines, errors = running(0)
    (state,) = running_states()
    assert (state.grpc_url, state.http_url, state.key) == (server.grpc_url, server.http_url, server.key)
    os.kill(server.process_id, signal.SIGKILL)
    thread.join(20)
    assert len(errors) == 1 and str(errors[0]).startswith("the Triton server was killed by signal 9") and lines == []


def test_a_dead_server_comes_back_on_the_same_ports_and_its_log_stays(running, server, tmp_path):
    _, lines, errors = running(2)
    FakeTriton(tmp_path, READY)
    first, ports, key = server.process_id, dict(server.ports), server.key
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: "the server answers again" in lines)
    assert server.process_id != first and server.ports == ports and server.key == key and errors == []
    assert "killed by signal 9" in lines[0] and "starting again in 0.05 s (1 of 2)" in lines[0]
    assert [state.restarts for state in running_states()] == [1]
    before, after = (tmp_path / name for name in ("log.1", "log"))
    assert before.read_text().startswith("the first of them\n") and "the first of them" not in after.read_text()
    assert lines[0].endswith(f"kept as {before}")


def test_restarts_that_fail_count_and_it_stays_down_after_the_limit(running, server, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "_LONGEST_PAUSE", 0.08)
    thread, lines, errors = running(3)
    FakeTriton(tmp_path, "import sys; print('error: creating server: no luck'); sys.exit(3)")
    os.kill(server.process_id, signal.SIGKILL)
    thread.join(20)
    assert "died 4 times in a row" in str(errors[0]) and "exit code 3" in str(errors[0]) and "no luck" in str(errors[0])
    assert [line.rpartition("starting again in ")[2][:6] for line in lines] == ["0.05 s", "0.08 s", "0.08 s"]


def test_a_server_that_has_recovered_is_forgiven(running, server, monkeypatch):
    monkeypatch.setattr(service, "_HEALTHY_SECONDS", 0.0)
    thread, lines, errors = running(1)
    for deaths in (1, 2):
        os.kill(server.process_id, signal.SIGKILL)
        wait_until(lambda deaths=deaths: lines.count("the server answers again") == deaths)
    assert errors == [] and thread.is_alive()


def test_a_first_start_that_fails_is_no_death(server, tmp_path):
    FakeTriton(tmp_path, "import sys; sys.exit(3)")
    lines = []
    with pytest.raises(ServerError, match="exit code 3"):
        Service(server, 2, lines.append).run()
    assert lines == []


def test_its_state_is_written_where_this_user_alone_reads_it():
    state = ServerState(
        os.getpid(), "/r", "127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3/metrics", "/l", "k", version=1
    )
    path = write_state(state)
    assert path.stat().st_mode & 0o777 == 0o600 and list(user_folder().iterdir()) == [path]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = write_state(ServerState(**{**vars(state), "process_id": ended.pid}))
    (user_folder() / "serving-damaged.json").write_text("{")
    assert running_states() == [state] and not left.exists(), "what a killed server left is removed"
    for _ in range(2):
        remove_state(os.getpid())
    assert running_states() == []
