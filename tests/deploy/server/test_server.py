"""A Triton on this machine, its flags and status; starting, watching, stopping its process, a script in its place."""

import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import raising
from rich.console import Console
from servers import READY, FakeTriton, Running, children_of, is_alive, wait_until

from rekd_deploy import DeadlineError, RepositoryError, ServerError, ServerUnavailableError, TritonServer
from rekd_deploy.errors import EngineError
from rekd_deploy.repository.config import config_text, read_config
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server import program, service, status
from rekd_deploy.server import server as module
from rekd_deploy.server.beside import Beside, all_beside, models_beside
from rekd_deploy.server.flags import check_host, server_flags, settled_ports
from rekd_deploy.server.program import find_installed
from rekd_deploy.server.service import Service
from rekd_deploy.server.status import ServerState, ServerStatus, StepTotals, running_states, status_table
from rekd_train.errors import ConfigError, MissingExtraError
from rekd_train.files import sha256


@pytest.fixture
def start(repository, tmp_path):
    given = {"grpc_port": 0, "http_port": 0, "metrics_port": 0, "log_file": tmp_path / "log"}
    return lambda script, **more: TritonServer(repository, **given, program=FakeTriton(tmp_path, script), **more)


CHILD = "import signal, subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"


def test_starts_waits_and_stops(start):
    server = start(READY)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    server.check_alive()  # it outlives the thread that started it
    process_id, space = server.process_id, server._space.path
    assert len(set(server.ports.values())) == 3 and 0 not in server.ports.values() and space.is_dir()
    assert server.grpc_url == f"127.0.0.1:{server.ports['grpc']}"
    with pytest.raises(ServerError, match="already running"):
        server.start()
    region = Path(f"/dev/shm/{server._memory_prefix}_left")
    region.touch()
    for _ in range(2):
        server.stop()
    assert not is_alive(process_id) and not space.exists() and not region.exists()
    with pytest.raises(ServerError, match="not running"):
        server.check_alive()
    with pytest.raises(RepositoryError, match="no model repository"):
        TritonServer(region / "nowhere").start()


def test_its_settings_reach_the_program(start, tmp_path):
    settings = {"host": "0.0.0.0", "exposed": True, "log_verbose": 1, "reload": True}
    with start("import sys\nprint(*sys.argv[1:], sep='\\n', flush=True)\n" + READY, **settings) as server:
        flags = (tmp_path / "log").read_text().splitlines()
        assert server.grpc_url.startswith("127.0.0.1:"), "the address of all interfaces is none"
        expected = {"log-verbose=1", "http-address=0.0.0.0", "model-control-mode=explicit", "allow-gpu-metrics=true",
                    f"model-repository={server.live.models}", f"http-port={server.ports['http']}"}  # fmt: skip
    assert {f"--{flag}" for flag in expected} <= set(flags) and server.live.current is None
    assert any(flag.endswith(f"statistics:rekd-admin={server.key}") for flag in flags)


NO_GPU = "E1 KIND_GPU but no GPUs are available"
END = "the end of its log {log}:\n"
@pytest.mark.parametrize(("script", "said"), [
    ("print('E1 \"CudaDriverHelper\"')\nprint('error: no luck')\nprint('bye')\nexit(3)",
     f"ended with exit code 3; {END}error: no luck"),
    (f"print({NO_GPU!r})",
     f"ended with exit code 0; it finds no GPU; fix: see nvidia-smi, or rekd-export --cpu; {END}{NO_GPU}"),
    ("for n in range(30): print('line', n)",
     f"ended with exit code 0; {END}" + "\n".join(f"line {n}" for n in range(18, 30))),
    ("import time\nprint('still loading', flush=True)\ntime.sleep(60)",
     f"was not ready after 1 s; {END}still loading"),
], ids=["errors", "no GPU", "no error", "never ready"])  # fmt: skip
def test_death_at_the_start_shows_the_end_of_the_log(start, tmp_path, script, said):
    server, lines = start(script, timeout=1.0 if "sleep" in script else 60.0), []
    with pytest.raises(ServerError) as error:
        Service(server, 2, lines.append).run()
    assert str(error.value) == f"the Triton server {said.format(log=tmp_path / 'log')}"
    assert server.process_id is None and lines == [], "it is not started again"


def test_five_earlier_logs_stay_and_one_that_is_no_plain_file_is_written_to(start, tmp_path):
    def logs(count):
        for number in range(count):
            with pytest.raises(ServerError, match=f"start {number}$"):
                start(f"print('start {number}')").start()
        return {path.name: path.read_text() for path in tmp_path.glob("log*")}
    assert logs(7) == {f"log.{age}" if age else "log": f"start {6 - age}\n" for age in range(6)}
    for path in tmp_path.glob("log*"):
        path.unlink()
    (tmp_path / "elsewhere").touch()
    (tmp_path / "log").symlink_to("elsewhere")
    assert logs(2) == {"log": "start 0\nstart 1\n"}


@pytest.mark.parametrize("waited_for", [False, True])
def test_death_of_a_process_behind_the_server_is_noticed(start, monkeypatch, waited_for):
    """Of one that Triton has ended itself it learns the end."""
    monkeypatch.setattr(module, "_ZOMBIE_SECONDS", 0.2)
    with start(CHILD + ("signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n" if waited_for else "") + READY) as server:
        os.kill(*children_of(server.process_id), signal.SIGKILL)
        for _ in range(25):
            with nullcontext() if waited_for else suppress(ServerError):
                server.check_alive()
            time.sleep(0.02)
        if not waited_for:
            with pytest.raises(ServerError, match="a process that runs one of the models has died"):
                server.check_alive()


def test_what_is_stopped_or_interrupted_leaves_nothing(start, monkeypatch):
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.5)
    with start(CHILD + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY) as server:
        deaf = [server.process_id, *children_of(server.process_id)]
    server, seen = start("import time\ntime.sleep(60)"), []
    monkeypatch.setattr(server, "_ready", lambda: seen.append(server.process_id) or raising(KeyboardInterrupt())())
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert len(deaf) == 2 and not any(map(is_alive, deaf + seen)) and server._space is None


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(service, "_FIRST_PAUSE", 0.05)


@pytest.fixture
def running(start):
    """A function: limit of restarts -> a service, ready."""
    begun = []
    yield lambda limit: begun.append(Running(start("print('the first', flush=True)\n" + READY), limit)) or begun[0]
    begun[0].stopped.set()
    begun[0].error()


def test_a_death_ends_the_service_with_a_word(running):
    it = running(0)
    (state,) = running_states()
    assert (state.grpc_url, state.http_url, state.key) == (it.server.grpc_url, it.server.http_url, it.server.key)
    it.kill()
    assert str(it.error()).startswith("the Triton server was killed by signal 9") and it.lines == []


def test_a_dead_server_comes_back_on_the_same_ports_and_its_log_stays(running, tmp_path, monkeypatch):
    it = running(2)
    FakeTriton(tmp_path, READY)
    first, same = it.server.process_id, (dict(it.server.ports), it.server.key)
    it.kill()
    wait_until(lambda: "the server answers again" in it.lines)
    assert it.server.process_id != first and (it.server.ports, it.server.key) == same
    assert "killed by signal 9" in it.lines[0] and "starting again in 0.05 s (1 of 2)" in it.lines[0]
    assert [state.restarts for state in running_states()] == [1]
    before, after = (tmp_path / name for name in ("log.1", "log"))
    assert before.read_text().startswith("the first\n") and "the first" not in after.read_text()
    assert it.lines[0].endswith(f"kept as {before}")
    monkeypatch.setattr(service, "_HEALTHY_SECONDS", 0.0)
    for deaths in (2, 3):  # more than the limit, but one that has recovered is forgiven
        it.kill()
        wait_until(lambda deaths=deaths: it.lines.count("the server answers again") == deaths)
    assert not it.ended.done()


def test_a_full_disk_at_a_restart_is_tried_again(running, monkeypatch):
    it = running(3)
    start, failures = it.server.start, [OSError("no room")]
    monkeypatch.setattr(it.server, "start", lambda: raising(failures.pop())() if failures else start())
    it.kill()
    wait_until(lambda: "the server answers again" in it.lines)
    assert it.lines[1].startswith("no room\nstarting again in 0.1 s (2 of 3)") and not it.ended.done()


def test_restarts_that_fail_count_and_it_stays_down_after_the_limit(running, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "_LONGEST_PAUSE", 0.08)
    it = running(3)
    FakeTriton(tmp_path, "import sys; print('error: creating server: no luck'); sys.exit(3)")
    it.kill()
    assert all(part in str(it.error()) for part in ("died 4 times in a row", "exit code 3", "no luck"))
    assert [line.rpartition("starting again in ")[2][:6] for line in it.lines] == ["0.05 s", "0.08 s", "0.08 s"]


def test_its_state_is_this_users_and_one_server_answers_in_time():
    place = ("/r", "127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3/metrics", "/l", "k")
    state = ServerState(os.getpid(), *place, version=1)
    path = status.write_state(state)
    assert path.stat().st_mode & 0o777 == 0o600 and list(status.user_folder().iterdir()) == [path]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = status.write_state(ServerState(ended.pid, *place, version=1))
    (status.user_folder() / "serving-damaged.json").write_text("{")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of a later rekd": 1}))
    assert running_states() == [state] and not left.exists(), "what a killed server left is removed"
    for _ in range(2):
        status.remove_state(os.getpid())
    assert running_states() == []
    with pytest.raises(ServerUnavailableError, match="no rekd-serve of yours is running here; fix: start one"):
        status.read_status(None)
    with pytest.raises(ServerUnavailableError, match="not one server, but http://127.0.0.1:2, http://127.0.0.1:9"):
        status.read_status(None, [STATE, replace(STATE, http_url="http://127.0.0.1:9")])
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(DeadlineError, match="within 0.5 s"):
        status.read_status(f"127.0.0.1:{listener.getsockname()[1]}", timeout=0.5)

TIMES = {"success": (20, 60), "queue": (20, 10), "compute_input": (20, 2), "compute_infer": (20, 46)}
TIMES |= {"compute_output": (20, 1), "fail": (2, 1)}
STATISTICS = {key: {"count": str(n), "ns": str(ms * 1_000_000)} for key, (n, ms) in TIMES.items()}
COUNTS = {"inference_count": "40", "execution_count": "10", "inference_stats": STATISTICS}
STEP = StepTotals.of({"name": "rekd_selector", "version": "3", **COUNTS})
STATE = ServerState(7, "/models", "127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3/m", "/log", "secret", 3,
                    beside={"rekd_five": "/models-5"})  # fmt: skip


def test_a_running_server_of_this_user_lends_its_key(monkeypatch):
    def opened(url, timeout, headers, tls):
        raise LookupError(headers)

    monkeypatch.setattr(status, "open_transport", opened)
    header, for_grpc = status.KEY_HEADER, status.GRPC_KEY_HEADER
    for url, lent in ((STATE.http_url, {header: "secret"}), (STATE.grpc_url, {for_grpc: "secret"}), ("[::1]:9", None)):
        with pytest.raises(LookupError) as found:
            status.read_status(url, [STATE])
        assert found.value.args == (lent,)


def shown(status, width=140):
    console = Console(width=width, file=io.StringIO())
    console.print(*status.lines(), status_table(status), sep="\n")
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_counts_means_table_and_document():
    assert STEP.to_dict() == {"model": "rekd_selector", "version": 3, "requests": 20, "failed": 2, "rows": 40,
                              "executions": 10, "request_ms": 3.0, "queue_ms": 0.5, "input_ms": 0.1, "compute_ms": 2.3,
                              "output_ms": 0.05, "other_ms": pytest.approx(0.05)}  # fmt: skip
    none = StepTotals.of({"name": "rekd", "version": "1", "inference_stats": {}})  # gRPC leaves zeros out
    assert (none.requests, none.rows, none.to_dict()["request_ms"], none.to_dict()["other_ms"]) == (0, 0, None, None)
    assert " - " in "".join(shown(ServerStatus("u", True, "2.51.0", (none,))))
    ensemble = replace(STEP, model="rekd", requests=1200)
    status = ServerStatus("http://127.0.0.1:2", True, "2.51.0", (ensemble, STEP), STATE)
    text = " ".join(" ".join(shown(status)).split())
    for part in ("ready, Triton 2.51.0, version 3", "/models (process 7)", "/models-5 as rekd_five", "1,200", "4.0",
                 "2.300", "rekd_selector", "the queues of its steps"):  # fmt: skip
        assert part in text
    assert "secret" not in text and "secret" not in json.dumps(status.to_dict())
    assert status.to_dict()["versions"] == [3] and status.to_dict()["steps"][1]["compute_ms"] == 2.3
    assert "started again 2 times" in " ".join(shown(replace(status, running=replace(STATE, restarts=2))))
    assert "live, not ready" in " ".join(shown(replace(status, ready=False)))
    names = [f"rekd{name}" for name in ("", "_answer", "_predictor", "_prepare", "_selector", "_single", "_text")]
    spent = {**STEP.nanoseconds, "request": 1_234_567 * 1_234_567_800}
    busy = replace(STEP, version=12, requests=1_234_567, failed=89_012, nanoseconds=spent)
    lines = shown(ServerStatus("u", True, "2.51.0", tuple(replace(busy, model=name) for name in names)), width=80)
    assert "…" not in "".join(lines) and max(map(len, lines)) <= 80
    head = next(number for number, line in enumerate(lines) if "executions" in line or "batch" in line)
    assert lines[head].split() == "model, version requests failed batch total queue input compute output other".split()
    rows = [line.split()[:7] for line in lines[head + 2 :][:7]]
    assert rows == [[name, "12", "1.2", "M", "89,012", "4.0", "1235."] for name in names]


def touched(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_an_installation_is_found_with_every_backend_that_is_needed(artefacts, repository, tmp_path):
    installation = tmp_path / "opt"  # as its container has it, with the python backend; empty files
    touched(installation / "bin/tritonserver").chmod(0o755)
    touched(installation / "backends/python/libtriton_python.so")
    for given in (".", "bin/tritonserver"):
        found = find_installed(installation / given)
        assert found.executable.samefile(installation / "bin" / "tritonserver")
        assert found.place_backends(installation / "work") == installation / "backends"
    touched(installation / "bin" / "not_executable")
    for given in ("nowhere", "backends", "bin/not_executable"):
        with pytest.raises(ServerError, match="is not an executable file; fix: --tritonserver"):
            find_installed(installation / given)
    found = find_installed(installation)
    found.check_servable(repository, read_manifest(repository))
    root = write_repository(artefacts, tmp_path / "r", target="onnxruntime", text_endpoint=True)
    with pytest.raises(ServerError, match=r"needs Triton's backend 'onnxruntime'.*libtriton_onnxruntime\.so"):
        found.check_servable(root, read_manifest(root))
    touched(installation / "backends" / "onnxruntime" / "libtriton_onnxruntime.so")
    found.check_servable(root, read_manifest(root))
    (installation / "backends" / "python" / "libtriton_python.so").unlink()  # of the text endpoint
    with pytest.raises(ServerError, match="needs Triton's backend 'python'"):
        found.check_servable(root, read_manifest(root))


def without(package):
    found = program.util.find_spec
    return lambda patch: patch.setattr(program.util, "find_spec", lambda name: None if name == package else found(name))


def on_313_without_the_wheel(patch):
    """Its requirement of NumPy 1 cannot be met there."""
    without("pytriton")(patch)
    patch.setattr(sys, "version_info", (3, 13, 5))


def no_shared_python(patch):
    patch.setattr(program.sysconfig, "get_config_var", lambda name: "/nowhere")
    patch.setattr(program, "_SYSTEM_FOLDERS", ())
    for prefix in ("base_prefix", "base_exec_prefix"):
        patch.setattr(sys, prefix, "/nowhere")
    patch.setattr(program.ctypes.util, "find_library", lambda name: None)


BOTH = ("rekd_deploy.runtimes.onnxruntime._is_installed", lambda distribution: True)
@pytest.mark.triton
@pytest.mark.parametrize(("change", "kind", "message"), [
    (lambda patch: patch.setattr(sys, "platform", "darwin"), ServerError, "Linux x86-64; this is darwin x86_64"),
    (lambda patch: patch.setattr(program.platform, "machine", lambda: "aarch64"), ServerError, "is linux aarch64"),
    (without("pytriton"), MissingExtraError,
     r"pytriton.*pip install (-e '.*\[serve\]'|--no-deps nvidia-pytriton==0\.7\.0)"),
    (on_313_without_the_wheel, MissingExtraError, r"fix: pip install --no-deps nvidia-pytriton==0\.7\.0$"),
    (without("onnxruntime"), MissingExtraError, r"pip install -e '.*\[cpu\]'"),
    (lambda patch: patch.setattr(*BOTH), EngineError, "both installed"),
    (no_shared_python, ServerError, "no shared library libpython3.*fix:"),
    (lambda patch: patch.setattr(program, "_PYTHON", "3.1"), ServerError, "no stub for Python 3.1")])  # fmt: skip
def test_what_is_not_right_is_named(wheel, monkeypatch, change, kind, message):
    change(monkeypatch)
    with pytest.raises(kind, match=message):
        program.find_wheel()


@pytest.mark.triton
def test_a_stub_linked_to_a_libpython_of_its_own_finds_this_machines_first(wheel, monkeypatch, tmp_path):
    """The wheel's libpython 3.13 lacks modules that Debian's has built in."""
    library = program._python_library()
    monkeypatch.setattr(program.Path, "glob", lambda self, pattern: [self / "libpython3-0a1b.13.so.1.0"])
    found = program.find_wheel()
    placed = found.place_backends(tmp_path) / "python"
    assert (placed / "libpython3-0a1b.13.so.1.0").resolve() == library.resolve()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    folders = program.find_wheel().environment(tmp_path)["LD_LIBRARY_PATH"].split(":")
    assert folders[0] == str(placed) and folders[1].endswith("nvidia_pytriton.libs") and folders[-1] == "/mine"
    monkeypatch.setattr(program, "_python_library", lambda: None)  # nothing to link to
    with pytest.raises(ServerError, match="no shared library"):
        program.find_wheel()


def flags(**settings):
    arguments = server_flags(["/models"], {"grpc": 1, "http": 2, "metrics": 3}, "0123abcd", **settings)
    found = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    assert len(found) == len(arguments) and all(argument.startswith("--") for argument in arguments)
    return found


ADMIN = "model-repository,shared-memory,trace,logging:rekd-admin=0123abcd"
EXPOSED = ADMIN.replace("logging", "logging,statistics")  # where others reach the server


def test_closed_by_default():
    assert flags() == {"disable-auto-complete-config": "", "model-repository": "/models", "model-control-mode": "none",
                       "strict-readiness": "true", "exit-on-error": "true", "exit-timeout-secs": "5",
                       "allow-gpu-metrics": "false", "http-restricted-api": ADMIN, "grpc-restricted-protocol": ADMIN,
                       "grpc-address": "127.0.0.1", "grpc-port": "1", "http-address": "127.0.0.1", "http-port": "2",
                       "metrics-address": "127.0.0.1", "metrics-port": "3"}  # fmt: skip


@pytest.mark.parametrize(("settings", "opened"), [
    ({"reload": True}, {"model-control-mode": "explicit", "load-model": "*", "strict-readiness": "false"}),
    ({"host": "0.0.0.0"}, {"grpc-address": "0.0.0.0", "http-address": "0.0.0.0"}),
    ({"exposed": True}, {"http-restricted-api": EXPOSED, "grpc-restricted-protocol": EXPOSED}),
    ({"gpu_metrics": True}, {"allow-gpu-metrics": "true"}),
    ({"log_verbose": 2, "exit_seconds": 9}, {"log-verbose": "2", "exit-timeout-secs": "9"}),
    ({"backends": "/b"}, {"backend-directory": "/b"}),
    ({"memory_prefix": "mine"}, {"backend-config": "python,shm-region-prefix-name=mine"})])  # fmt: skip
def test_each_setting_opens_what_it_names_alone(settings, opened):
    assert flags(**settings) == flags() | opened


def test_exports_beside_have_names_of_their_own():
    given = ["five=runs/models", "runs/models-5/", "six=runs/budget=0.05", "/runs/a=b/seven"]
    found = [(each.model, str(each.repository)) for each in all_beside(given)]
    assert found == [("rekd_five", "runs/models"), ("rekd_models-5", "runs/models-5"), ("rekd_six", "runs/budget=0.05"),
                     ("rekd_seven", "/runs/a=b/seven")]  # fmt: skip
    wrong = {"single=models": "'single' is another model's", "text=models": "another model's", "a=": "no repository",
             "a b=models": "'a b' is no model's name", f"{'x' * 41}=models": "is no model's name", "": "no repository"}
    for each, reason in wrong.items():
        with pytest.raises(ConfigError, match=f"{reason}.*--beside"):
            all_beside([each])
    assert models_beside(["five", "rekd_six", "rekd_five"]) == ["rekd_five", "rekd_six"]
    for name in (".", "..", "./five", "five=models", "a b", "", "selector", "rekd_single"):
        with pytest.raises(ConfigError, match=f"named '{re.escape(name)}'; fix: --beside NAME"):
            models_beside([name])
    with pytest.raises(ConfigError, match="two exports beside are named a"):
        all_beside(["a=x", "y/a"])
    assert server_flags(["/a", "/b"], {"grpc": 1, "http": 2, "metrics": 3}, "k")[1:3] == [
        "--model-repository=/a", "--model-repository=/b"]  # fmt: skip


def test_exports_beside_are_copied_once_whole_or_not_at_all(artefacts, repository, start, tmp_path, monkeypatch):
    root = write_repository(replace(artefacts, single=artefacts.predictor), tmp_path / "models")
    config, manifest = root / "rekd_single" / "config.pbtxt", read_manifest(root)
    told = read_config(config)
    del told.parameters["budget"]  # as exports of before have it
    config.write_text(config_text(told))
    manifest["repository"]["files"]["rekd_single/config.pbtxt"] = sha256(config)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with start(READY, beside=[Beside("x", root)]) as server:
        command = Path(f"/proc/{server.process_id}/cmdline").read_text().split("\0")
        _, placed = (Path(each.partition("=")[2]) for each in command if each.startswith("--model-repository="))
        assert [each.name for each in placed.iterdir()] == ["rekd_x"]
        copied = read_config(placed / "rekd_x" / "config.pbtxt")
        assert (copied.name, copied.parameters["budget"].string_value) == ("rekd_x", "0.25")
        assert read_config(config).name == "rekd_single", "the repository stays as it is"
        config.write_text("damaged meanwhile")
        server.stop()
        server.start()
        assert read_config(placed / "rekd_x" / "config.pbtxt") == copied, "a restart serves what was served"
    assert not placed.exists()
    for where, reason in ((root, "changed since the export"), (repository, "holds no single graph.*--single-graph"),
                          (tmp_path / "none", "no model repository at")):  # fmt: skip
        server = start(READY, beside=[Beside("x", where)])
        with pytest.raises(RepositoryError, match=reason):
            server.start()
        assert server.process_id is None and server._aside is None
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")
    defaults = [full if each is shutil.copy2 else each for each in shutil.copytree.__defaults__]
    monkeypatch.setattr(shutil.copytree, "__defaults__", tuple(defaults))
    with pytest.raises(RepositoryError, match=f"has no room for a copy of {repository}.*TMPDIR"):
        start(READY, beside=[Beside("x", repository)]).start()


def test_a_host_and_ports_that_cannot_be_used_are_named_with_their_flags():
    check_host("127.0.0.1", exposed=False)
    for address in ("0.0.0.0", "192.168.1.4"):
        check_host(address, exposed=True)
        with pytest.raises(ConfigError, match=rf"host {address} .*neither a login nor TLS.*--expose-without-login"):
            check_host(address, exposed=False)
    for address in ("", "localhost", "::1", "127.0.0.1:8000", "here"):
        with pytest.raises(ConfigError, match="is no IPv4 address"):
            check_host(address, exposed=True)
    free = settled_ports({"grpc": 0, "http": 0, "metrics": 0})
    assert settled_ports(free) == free and len(set(free.values())) == 3
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        said = rf"port {taken} cannot be used \(Address already in use\); choose another with --grpc-port"
        with pytest.raises(ServerError, match=rf"{said}.*port 70000 cannot be used"):
            settled_ports({"grpc": taken, "http": 70000, "metrics": 0})
    with pytest.raises(ServerError, match="choose another with --http-port"):
        settled_ports({"grpc": free["grpc"], "http": free["grpc"], "metrics": 0})
