"""Starting, watching and stopping a server process, with a stand-in for Triton where the real one is not needed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from servers import READY, FakeTriton

from rekd_deploy.errors import EngineError, RepositoryError, ServerError
from rekd_deploy.server import program as triton_wheel
from rekd_deploy.server.process import settled_ports
from rekd_deploy.server.server import TritonServer
from rekd_train.errors import MissingExtraError

LOOPBACK = dict.fromkeys(("grpc", "http", "metrics"), "127.0.0.1")


@pytest.fixture
def start(repository, tmp_path):
    """A function: script -> an unstarted server that will run it."""

    def made(script, **settings):
        program = FakeTriton(tmp_path, script)
        return TritonServer(repository, 0, 0, 0, log_file=tmp_path / "log", program=program, **settings)

    return made


def alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_starts_waits_and_stops(start):
    with start(READY) as server:
        process_id = server.process_id
        assert alive(process_id)
        server.check_alive()
        assert len(set(server.ports.values())) == 3 and 0 not in server.ports.values()
        assert server.grpc_url == f"127.0.0.1:{server.ports['grpc']}"
        work = server._space.path
        assert work.is_dir()
    assert not alive(process_id) and not work.exists()
    with pytest.raises(ServerError, match="not running"):
        server.check_alive()
    server.stop()


def test_what_a_killed_server_left_behind_is_cleared_away(start, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    code = (
        "import os, signal, tempfile\nfrom rekd_deploy.repository.workspaces import Workspace\n"
        f"tempfile.tempdir = {str(folder)!r}\nspace = Workspace('rekd-serve-')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    left = list(folder.iterdir())
    assert len(left) == 1
    with start(READY) as server:
        assert list(folder.iterdir()) == [server._space.path] != left
    assert list(folder.iterdir()) == []


def test_flags_are_safe(start, tmp_path):
    server = start("import sys\nprint(*sys.argv[1:], sep='\\n', flush=True)\n" + READY)
    with server:
        flags = (tmp_path / "log").read_text().splitlines()
    assert set(flags) >= {
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        "--exit-on-error=true",
        "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1",
        "--metrics-address=127.0.0.1",
    }
    assert any(flag.startswith("--http-restricted-api=model-repository,shared-memory") for flag in flags)
    assert any(flag.startswith("--grpc-restricted-protocol=model-repository,shared-memory") for flag in flags)


def test_death_at_the_start_shows_the_end_of_the_log(start, tmp_path):
    script = "import sys\nprint('E1 \"CudaDriverHelper\"')\nprint('error: creating server: no luck')\nsys.exit(3)"
    server = start(script)
    with pytest.raises(ServerError) as error:
        server.start()
    message = str(error.value)
    assert "exit code 3" in message and str(tmp_path / "log") in message
    assert message.endswith("error: creating server: no luck") and "CudaDriverHelper" not in message
    assert server.process_id is None


def test_a_repository_for_gpus_where_there_is_none_says_what_to_do(start):
    said = "E1 failed: instance group rekd_selector_0 has kind KIND_GPU but no GPUs are available"
    with pytest.raises(ServerError, match="exit code 1; it finds no GPU; fix: .*rekd-export --cpu; the end of its log"):
        start(f"import sys\nprint('{said}')\nsys.exit(1)").start()


def test_death_without_an_error_shows_the_last_lines(start):
    with pytest.raises(ServerError, match="line 29$") as error:
        start("for n in range(30): print('line', n, flush=True)").start()
    assert str(error.value).count("line ") == 12


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
        for _ in range(100):
            time.sleep(0.02)
            if not alive(server.process_id):
                break
        with pytest.raises(ServerError, match="killed by signal 9"):
            server.check_alive()


def test_death_of_a_process_behind_the_server_is_noticed(start, tmp_path):
    child = "import subprocess\nc = subprocess.Popen(['sleep', '60'])\n"
    child += f"open({str(tmp_path / 'child')!r}, 'w').write(str(c.pid))\n"
    with start(child + READY) as server:
        server.check_alive()
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
        with pytest.raises(ServerError, match="a process that runs one of the models has died"):
            for _ in range(100):
                time.sleep(0.02)
                server.check_alive()
        server.check_running()


@pytest.mark.parametrize(
    ("change", "certain", "dies"), [(0, True, True), (1, True, True), (1, False, False), (-1, True, False)]
)
def test_a_death_while_models_are_exchanged_is_noticed(start, tmp_path, monkeypatch, change, certain, dies):
    """One of two processes ends before they are counted again: the exchange may have ended it, or not."""
    monkeypatch.setattr("rekd_deploy.server.server._SETTLE_SECONDS", 0.2)
    child = "import signal, subprocess\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    child += "children = [subprocess.Popen(['sleep', '60']) for _ in range(2)]\n"
    child += f"open({str(tmp_path / 'child')!r}, 'w').write(str(children[0].pid))\n"
    with start(child + READY) as server:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
        server.watch_models(change, certain)
        if not dies:
            return server.check_alive()
        with pytest.raises(ServerError, match="a process that runs one of the models has died"):
            for _ in range(100):
                server.check_alive()
                time.sleep(0.02)


def test_never_ready(start):
    server = start("import time\nprint('still loading', flush=True)\ntime.sleep(60)", timeout=1.0)
    with pytest.raises(ServerError, match=r"not ready after 1 s(.|\n)*still loading"):
        server.start()
    assert server.process_id is None


def test_a_deaf_server_and_its_children_are_stopped(start, tmp_path, monkeypatch):
    monkeypatch.setattr("rekd_deploy.server.process._STOP_SECONDS", 0.5)
    child = "import subprocess, sys, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    child += f"c = subprocess.Popen(['sleep', '60'])\nopen({str(tmp_path / 'child')!r}, 'w').write(str(c.pid))\n"
    with start(child + READY) as server:
        process_id, child_id = server.process_id, int((tmp_path / "child").read_text())
        assert alive(child_id)
    assert not alive(process_id) and not alive(child_id)


def test_interruption_while_waiting_leaves_nothing(start, monkeypatch):
    server = start("import time\ntime.sleep(60)")
    seen = []

    def interrupted():
        seen.append(server.process_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert not alive(seen[0]) and server._space is None


def test_outlives_the_thread_that_started_it(start):
    server = start(READY)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    server.check_alive()
    server.stop()


def test_twice_is_once_too_many(start):
    with start(READY) as server, pytest.raises(ServerError, match="already running"):
        server.start()


def test_damaged_repository_comes_first(tmp_path):
    with pytest.raises(RepositoryError, match="no model repository"):
        TritonServer(tmp_path / "nowhere").start()


# ports


def test_taken_ports_are_named_with_their_flags():
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        grpc, http = (listener.getsockname()[1] for listener in (first, second))
        with pytest.raises(ServerError) as error:
            settled_ports({"grpc": grpc, "http": http, "metrics": 0}, LOOPBACK)
    message = str(error.value)
    assert f"port {grpc} cannot be used" in message and "--grpc-port" in message
    assert f"port {http} cannot be used" in message and "--http-port" in message


def test_one_port_for_two():
    free = settled_ports({"grpc": 0}, LOOPBACK)["grpc"]
    with pytest.raises(ServerError, match="given twice; change --http-port"):
        settled_ports({"grpc": free, "http": free, "metrics": 0}, LOOPBACK)


def test_impossible_port():
    with pytest.raises(ServerError, match="70000 is outside"):
        settled_ports({"grpc": 70000}, LOOPBACK)


# what the wheel needs


def test_missing_wheel(monkeypatch):
    found = triton_wheel.util.find_spec
    monkeypatch.setattr(triton_wheel.util, "find_spec", lambda name: None if name == "pytriton" else found(name))
    with pytest.raises(MissingExtraError, match=r"pytriton.*pip install -e '.*\[serve\]'"):
        triton_wheel.find_wheel()


@pytest.fixture
def installed():
    try:
        return triton_wheel.find_wheel()
    except (MissingExtraError, ServerError) as error:
        pytest.skip(str(error))


@pytest.mark.triton
def test_numpy_2_is_named(installed, monkeypatch):
    monkeypatch.setattr(triton_wheel.metadata, "version", lambda name: "2.4.1")
    with pytest.raises(ServerError, match=r"numpy 2.4.1 is installed.*numpy < 2.*pip install -e '.*\[serve\]'"):
        triton_wheel.find_wheel()


@pytest.mark.triton
def test_missing_onnxruntime(installed, monkeypatch):
    found = triton_wheel.util.find_spec
    monkeypatch.setattr(triton_wheel.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(MissingExtraError, match=r"pip install -e '.*\[cpu\]'"):
        triton_wheel.find_wheel()


@pytest.mark.triton
def test_both_flavours_of_onnxruntime(installed, monkeypatch):
    monkeypatch.setattr("rekd_deploy.runtimes.onnxruntime._is_installed", lambda distribution: True)
    with pytest.raises(EngineError, match="both installed"):
        triton_wheel.find_wheel()


@pytest.mark.triton
def test_python_without_its_shared_library(installed, monkeypatch):
    monkeypatch.setattr(triton_wheel.sysconfig, "get_config_var", lambda name: "/nowhere")
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")
    monkeypatch.setattr(sys, "base_exec_prefix", "/nowhere")
    monkeypatch.setattr(triton_wheel.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ServerError, match="no shared library libpython3.*fix:"):
        triton_wheel.find_wheel()


@pytest.mark.parametrize(("platform", "machine"), [("darwin", "arm64"), ("linux", "aarch64")])
def test_another_machine(monkeypatch, platform, machine):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(triton_wheel.platform, "machine", lambda: machine)
    with pytest.raises(ServerError, match=f"Linux x86-64; this is {platform} {machine}"):
        triton_wheel.find_wheel()


@pytest.mark.triton
def test_backend_gets_the_stub_of_this_python(installed, tmp_path):
    backends = installed.place_backends(tmp_path)
    stub = backends / "python" / "triton_python_backend_stub"
    assert os.access(stub, os.X_OK) and stub.read_bytes() == installed._stub.read_bytes()
    assert (backends / "python" / "libtriton_python.so").is_file()
    environment = installed.environment()
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    import numpy

    assert str(Path(numpy.__file__).parents[2]) in environment["PYTHONPATH"].split(os.pathsep)
    assert str(installed.libraries) in environment["LD_LIBRARY_PATH"].split(os.pathsep)
