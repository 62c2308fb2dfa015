"""A server that is looked after, with a script in Triton's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from servers import READY, FakeTriton

from rekd_deploy.errors import ServerError
from rekd_deploy.server.process import user_folder
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.service import (
    NEVER,
    RestartPolicy,
    ServerState,
    Service,
    remove_state,
    running_states,
    write_state,
)
from rekd_train.errors import ConfigError

QUICK = RestartPolicy(limit=2, first_pause=0.05)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def server(repository, tmp_path):
    return TritonServer(repository, 0, 0, 0, log_file=tmp_path / "log", program=FakeTriton(tmp_path, READY))


@pytest.fixture
def running(server):
    """A function: policy -> the service in a thread of its own, ready; its lines; a way to end it."""
    stopped, threads = threading.Event(), []

    def begun(policy):
        lines, errors, ready = [], [], threading.Event()

        def work():
            try:
                Service(server, policy, report=lines.append).run(ready.set, stopped)
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


def wait_until(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_death_ends_the_service_with_a_word(running, server):
    thread, lines, errors = running(NEVER)
    os.kill(server.process_id, signal.SIGKILL)
    thread.join(20)
    assert len(errors) == 1 and "killed by signal 9" in str(errors[0]) and lines == []


def test_a_dead_server_comes_back_on_the_same_ports(running, server):
    _, lines, errors = running(QUICK)
    first, ports, key = server.process_id, dict(server.ports), server.key
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: "the server answers again" in lines)
    assert server.process_id != first and server.ports == ports and server.key == key and errors == []
    assert "killed by signal 9" in lines[0] and "starting again in 0.05 s (1 of 2)" in lines[0]
    assert [state.restarts for state in running_states()] == [1]


def test_the_log_of_the_death_stays(running, server, tmp_path):
    FakeTriton(tmp_path, "print('the first of them', flush=True)\n" + READY)
    _, lines, _ = running(QUICK)
    FakeTriton(tmp_path, READY)
    os.kill(server.process_id, signal.SIGKILL)
    wait_until(lambda: "the server answers again" in lines)
    first, second = (tmp_path / name for name in ("log.1", "log"))
    assert first.read_text().startswith("the first of them\n") and "the first of them" not in second.read_text()
    assert lines[0].endswith(f"kept as {first}")


def test_it_stays_down_after_the_limit(running, server):
    thread, lines, errors = running(QUICK)
    seen = set()
    for _ in range(3):
        wait_until(lambda: server.process_id not in {None, *seen})
        seen.add(server.process_id)
        os.kill(server.process_id, signal.SIGKILL)
    thread.join(20)
    assert len(errors) == 1 and "died 3 times in a row" in str(errors[0])
    assert len(seen) == 3 and sum("starting again" in line for line in lines) == 2


def test_a_server_that_has_recovered_is_forgiven(running, server):
    thread, lines, errors = running(RestartPolicy(limit=1, first_pause=0.05, healthy_seconds=0.0))
    for deaths in (1, 2, 3):
        first = server.process_id
        os.kill(first, signal.SIGKILL)
        wait_until(lambda deaths=deaths: lines.count("the server answers again") == deaths)
    assert errors == [] and thread.is_alive()


def test_restarts_that_fail_count(running, server, tmp_path):
    thread, lines, errors = running(QUICK)
    FakeTriton(tmp_path, "import sys; print('error: creating server: no luck'); sys.exit(3)")
    os.kill(server.process_id, signal.SIGKILL)
    thread.join(20)
    assert "died 3 times" in str(errors[0]) and "exit code 3" in str(errors[0]) and "no luck" in str(errors[0])
    assert "exit code 3" in lines[1]


def test_a_first_start_that_fails_is_no_death(repository, tmp_path):
    program = FakeTriton(tmp_path, "import sys; sys.exit(3)")
    server = TritonServer(repository, 0, 0, 0, log_file=tmp_path / "log", program=program)
    lines = []
    with pytest.raises(ServerError, match="exit code 3"):
        Service(server, QUICK, report=lines.append).run()
    assert lines == []


def test_its_state_tells_where_it_listens(running, server):
    running(NEVER)
    (state,) = running_states()
    assert (state.grpc_url, state.http_url, state.key) == (server.grpc_url, server.http_url, server.key)


# when it is started again


def test_pauses_double_up_to_the_longest_and_end_at_the_limit():
    policy = RestartPolicy(limit=6, first_pause=0.5, longest_pause=3.0)
    assert [policy.pause(deaths) for deaths in range(1, 9)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0, None, None]


def test_never():
    assert NEVER.pause(1) is None


def test_negative_limit():
    with pytest.raises(ConfigError, match="is -1; it must be at least 0"):
        RestartPolicy(limit=-1)


# what it writes down


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

    monkeypatch.setattr(json, "dump", watched)
    write_state(a_state())
    assert modes == [0o600]


def test_what_a_killed_server_left_is_removed():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = write_state(a_state(ended.pid))
    write_state(a_state())
    (user_folder() / "serving-damaged.json").write_text("{")
    assert running_states() == [a_state()] and not path.exists()
