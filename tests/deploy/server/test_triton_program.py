"""A Triton that is on this machine: installed by someone, or that of the wheel."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rekd_deploy.errors import EngineError, ServerError
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server import program
from rekd_deploy.server.program import find_installed
from rekd_train.errors import MissingExtraError


@pytest.fixture
def installation(tmp_path):
    """/opt/tritonserver as its container has it, with the python backend; empty files."""
    root = tmp_path / "opt"
    for name in ("bin/tritonserver", "backends/python/libtriton_python.so"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (root / "bin" / "tritonserver").chmod(0o755)
    return root


@pytest.mark.parametrize("given", [".", "bin/tritonserver"])
def test_found_by_its_folder_or_itself(installation, given):
    found = find_installed(installation / given)
    assert found.executable.samefile(installation / "bin" / "tritonserver")
    assert found.place_backends(installation / "work") == installation / "backends"


@pytest.mark.parametrize("given", ["nowhere", "backends", "bin/not_executable"])
def test_what_is_no_server(installation, given):
    (installation / "bin" / "not_executable").touch()
    with pytest.raises(ServerError, match="is not an executable file; fix: --tritonserver"):
        find_installed(installation / given)


def test_every_backend_that_is_needed_must_be_there(installation, artefacts, repository, tmp_path):
    found = find_installed(installation)
    found.check_servable(repository, read_manifest(repository))
    root = write_repository(artefacts, tmp_path / "r", target="onnxruntime", text_endpoint=True)
    with pytest.raises(ServerError, match=r"needs Triton's backend 'onnxruntime'.*libtriton_onnxruntime\.so"):
        found.check_servable(root, read_manifest(root))
    library = installation / "backends" / "onnxruntime" / "libtriton_onnxruntime.so"
    library.parent.mkdir()
    library.touch()
    found.check_servable(root, read_manifest(root))
    (installation / "backends" / "python" / "libtriton_python.so").unlink()  # of the text endpoint
    with pytest.raises(ServerError, match="needs Triton's backend 'python'"):
        found.check_servable(root, read_manifest(root))


# what the wheel needs


def without(monkeypatch, package):
    found = program.util.find_spec
    monkeypatch.setattr(program.util, "find_spec", lambda name: None if name == package else found(name))


def test_missing_wheel(monkeypatch):
    without(monkeypatch, "pytriton")
    with pytest.raises(MissingExtraError, match=r"pytriton.*pip install -e '.*\[serve\]'"):
        program.find_wheel()


@pytest.mark.parametrize(("platform", "machine"), [("darwin", "arm64"), ("linux", "aarch64")])
def test_another_machine(monkeypatch, platform, machine):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(program.platform, "machine", lambda: machine)
    with pytest.raises(ServerError, match=f"Linux x86-64; this is {platform} {machine}"):
        program.find_wheel()


def numpy_2(monkeypatch):
    monkeypatch.setattr(program.metadata, "version", lambda name: "2.4.1")


def both_flavours(monkeypatch):
    monkeypatch.setattr("rekd_deploy.runtimes.onnxruntime._is_installed", lambda distribution: True)


def no_shared_python(monkeypatch):
    monkeypatch.setattr(program.sysconfig, "get_config_var", lambda name: "/nowhere")
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")
    monkeypatch.setattr(sys, "base_exec_prefix", "/nowhere")
    monkeypatch.setattr(program.ctypes.util, "find_library", lambda name: None)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (numpy_2, ServerError, r"numpy 2.4.1 is installed.*numpy < 2.*pip install -e '.*\[serve\]'"),
        (lambda patch: without(patch, "onnxruntime"), MissingExtraError, r"pip install -e '.*\[cpu\]'"),
        (both_flavours, EngineError, "both installed"),
        (no_shared_python, ServerError, "no shared library libpython3.*fix:"),
        (lambda patch: patch.setattr(program, "_PYTHON", "3.1"), ServerError, "no stub for Python 3.1"),
    ],
    ids=["numpy 2", "no onnxruntime", "onnxruntime twice", "no libpython", "another Python"],
)
def test_what_is_not_right_is_named(wheel, monkeypatch, change, kind, message):
    change(monkeypatch)
    with pytest.raises(kind, match=message):
        program.find_wheel()


@pytest.mark.triton
def test_backend_gets_the_stub_of_this_python(wheel, tmp_path):
    import numpy

    backends = wheel.place_backends(tmp_path)
    stub = backends / "python" / "triton_python_backend_stub"
    assert os.access(stub, os.X_OK) and stub.read_bytes() == wheel.stub.read_bytes()
    assert (backends / "python" / "libtriton_python.so").is_file()
    environment = {name: value.split(os.pathsep) for name, value in wheel.environment().items()}
    assert environment["PATH"][0] == str(Path(sys.executable).parent) and environment["PYTHONHOME"] == [""]
    assert str(Path(numpy.__file__).parents[1]) in environment["PYTHONPATH"]
    assert any(path.endswith("nvidia_pytriton.libs") for path in environment["LD_LIBRARY_PATH"])
