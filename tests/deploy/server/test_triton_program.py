"""A Triton on this machine, and the flags that it is started with: closed by default, opened in so many words."""

import socket
import sys

import pytest

from rekd_deploy.errors import EngineError, ServerError
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server import program
from rekd_deploy.server.flags import check_host, server_flags, settled_ports
from rekd_deploy.server.program import find_installed
from rekd_train.errors import ConfigError, MissingExtraError


def touched(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def installation(tmp_path):
    touched(tmp_path / "opt/bin/tritonserver").chmod(0o755)
    touched(tmp_path / "opt/backends/python/libtriton_python.so")
    return tmp_path / "opt"


def test_an_installation_is_found_with_every_backend_that_is_needed(installation, artefacts, repository, tmp_path):
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


def no_shared_python(patch):
    patch.setattr(program.sysconfig, "get_config_var", lambda name: "/nowhere")
    for prefix in ("base_prefix", "base_exec_prefix"):
        patch.setattr(sys, prefix, "/nowhere")
    patch.setattr(program.ctypes.util, "find_library", lambda name: None)


BOTH = ("rekd_deploy.runtimes.onnxruntime._is_installed", lambda distribution: True)
@pytest.mark.triton
@pytest.mark.parametrize(("change", "kind", "message"), [
    (lambda patch: patch.setattr(sys, "platform", "darwin"), ServerError, "Linux x86-64; this is darwin x86_64"),
    (lambda patch: patch.setattr(program.platform, "machine", lambda: "aarch64"), ServerError, "is linux aarch64"),
    (without("pytriton"), MissingExtraError, r"pytriton.*pip install -e '.*\[serve\]'"),
    (without("onnxruntime"), MissingExtraError, r"pip install -e '.*\[cpu\]'"),
    (lambda patch: patch.setattr(program.metadata, "version", lambda name: "2.4.1"), ServerError,
     r"numpy 2.4.1 is installed.*numpy < 2.*pip install -e '.*\[serve\]'"),
    (lambda patch: patch.setattr(*BOTH), EngineError, "both installed"),
    (no_shared_python, ServerError, "no shared library libpython3.*fix:"),
    (lambda patch: patch.setattr(program, "_PYTHON", "3.1"), ServerError, "no stub for Python 3.1")])  # fmt: skip
def test_what_is_not_right_is_named(wheel, monkeypatch, change, kind, message):
    change(monkeypatch)
    with pytest.raises(kind, match=message):
        program.find_wheel()


def flags(**settings):
    arguments = server_flags("/models", {"grpc": 1, "http": 2, "metrics": 3}, "0123abcd", **settings)
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
