"""Starting, watching and stopping a server process, with a script in Triton's place."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from servers import READY, FakeTriton, is_alive, wait_until

from rekd_deploy.errors import RepositoryError, ServerError
from rekd_deploy.server import server as module
from rekd_deploy.server.server import TritonServer


@pytest.fixture
def start(repository, tmp_path):
    """A function: script -> an unstarted server that will run it."""

    def made(script, **settings):
        program = FakeTriton(tmp_path, script)
        return TritonServer(repository, 0, 0, 0, log_file=tmp_path / "log", program=program, **settings)

    return made


@pytest.fixture
def with_child(tmp_path):
    """The beginning of a script that starts a process, and a function that returns its id."""
    code = "import signal, subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
    code += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
    return code, lambda: int((tmp_path / "child").read_text())


def test_starts_waits_and_stops(start):
    region = None
    with start(READY) as server:
        process_id, space = server.process_id, server._space.path
        server.check_alive()
        assert len(set(server.ports.values())) == 3 and 0 not in server.ports.values() and space.is_dir()
        assert server.grpc_url == f"127.0.0.1:{server.ports['grpc']}"
        with pytest.raises(ServerError, match="already running"):
            server.start()
        region = Path(f"/dev/shm/{server._memory_prefix}_left")
        region.touch()
    assert not is_alive(process_id) and not space.exists() and not region.exists()
    with pytest.raises(ServerError, match="not running"):
        server.check_alive()
    server.stop()


def test_its_settings_reach_the_program(start, tmp_path):
    settings = {"host": "0.0.0.0", "exposed": True, "log_verbose": 1, "reload": True}
    with start("import sys\nprint(*sys.argv[1:], sep='\\n', flush=True)\n" + READY, **settings) as server:
        flags = (tmp_path / "log").read_text().splitlines()
        assert server.grpc_url.startswith("127.0.0.1:"), "the address of all interfaces is none"
        expected = {"log-verbose=1", "http-address=0.0.0.0", "model-control-mode=explicit", "allow-gpu-metrics=true",
                    f"model-repository={server.live.models}", f"http-port={server.ports['http']}"}  # fmt: skip
    assert {f"--{flag}" for flag in expected} <= set(flags)
    assert any(flag.endswith(f"statistics:rekd-admin={server.key}") for flag in flags)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("print('E1 \"CudaDriverHelper\"')\nprint('error: no luck')\nprint('bye')\nexit(3)",
         "ended with exit code 3; the end of its log {log}:\nerror: no luck"),
        ("print('E1 KIND_GPU but no GPUs are available')",
         "ended with exit code 0; it finds no GPU; fix: see nvidia-smi, or rekd-export --cpu; "
         "the end of its log {log}:\nE1 KIND_GPU but no GPUs are available"),
        ("for n in range(30): print('line', n)",
         "ended with exit code 0; the end of its log {log}:\n" + "\n".join(f"line {n}" for n in range(18, 30))),
    ],
    ids=["errors", "no GPU", "no error"],
)  # fmt: skip
def test_death_at_the_start_shows_the_end_of_the_log(start, tmp_path, script, said):
    server = start(script)
    with pytest.raises(ServerError) as error:
        server.start()
    assert str(error.value) == f"the Triton server {said.format(log=tmp_path / 'log')}" and server.process_id is None


def test_five_earlier_logs_stay(start, tmp_path):
    for number in range(7):
        with pytest.raises(ServerError, match=f"start {number}$"):
            start(f"print('start {number}')").start()
    logs = {path.name: path.read_text() for path in tmp_path.glob("log*")}
    assert logs == {f"log.{age}" if age else "log": f"start {6 - age}\n" for age in range(6)}


def test_a_log_that_is_no_plain_file_is_written_to(start, tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "log").symlink_to("elsewhere")
    for _ in range(2):
        with pytest.raises(ServerError, match="line$"):
            start("print('line')").start()
    assert (tmp_path / "elsewhere").read_text() == "line\nline\n" and not (tmp_path / "log.1").exists()


def test_death_later_is_noticed(start):
    with start(READY) as server:
        os.kill(server.process_id, signal.SIGKILL)
        wait_until(lambda: not is_alive(server.process_id))
        with pytest.raises(ServerError, match="killed by signal 9"):
            server.check_alive()


@pytest.mark.parametrize("waited_for", [False, True])
def test_death_of_a_process_behind_the_server_is_noticed(start, with_child, monkeypatch, waited_for):
    """Of one that Triton has ended itself it learns the end."""
    monkeypatch.setattr(module, "_ZOMBIE_SECONDS", 0.2)
    code, child = with_child
    with start(code + ("signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n" if waited_for else "") + READY) as server:
        os.kill(child(), signal.SIGKILL)
        until = time.monotonic() + (0.5 if waited_for else 10.0)
        try:
            while time.monotonic() < until:
                server.check_alive()
                time.sleep(0.02)
        except ServerError as error:
            assert not waited_for and "a process that runs one of the models has died" in str(error)
        else:
            assert waited_for


def test_never_ready(start):
    server = start("import time\nprint('still loading', flush=True)\ntime.sleep(60)", timeout=1.0)
    with pytest.raises(ServerError, match=r"not ready after 1 s(.|\n)*still loading"):
        server.start()
    assert server.process_id is None


def test_a_deaf_server_and_its_children_are_stopped(start, with_child, monkeypatch):
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.5)
    code, child = with_child
    with start(code + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY) as server:
        process_id = server.process_id
        assert is_alive(child())
    assert not is_alive(process_id) and not is_alive(child())


def test_interruption_while_waiting_leaves_nothing(start, monkeypatch):
    server = start("import time\ntime.sleep(60)")
    seen = []

    def interrupted():
        seen.append(server.process_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert not is_alive(seen[0]) and server._space is None


def test_outlives_the_thread_that_started_it(start):
    server = start(READY)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    server.check_alive()
    server.stop()


def test_damaged_repository_comes_first(tmp_path):
    with pytest.raises(RepositoryError, match="no model repository"):
        TritonServer(tmp_path / "nowhere").start()
