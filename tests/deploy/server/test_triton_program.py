"""A Triton that someone has installed."""

from __future__ import annotations

import pytest

from rekd_deploy.errors import ServerError
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.program import find_installed


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
    assert found.caches is None
    (installation / "caches").mkdir()
    assert found.caches == installation / "caches"


def test_backends_elsewhere(installation, tmp_path):
    moved = (installation / "backends").rename(tmp_path / "elsewhere")
    with pytest.raises(ServerError, match="no folder .*backends.*--backends"):
        find_installed(installation)
    assert find_installed(installation, moved).place_backends(tmp_path) == moved


@pytest.mark.parametrize("given", ["nowhere", "backends"])
def test_what_is_no_server(installation, given):
    with pytest.raises(ServerError, match="is not an executable file; fix: --tritonserver"):
        find_installed(installation / given)


def test_not_executable(installation):
    (installation / "bin" / "tritonserver").chmod(0o644)
    with pytest.raises(ServerError, match="is not an executable file"):
        find_installed(installation)


def test_a_backend_that_is_missing(installation, artefacts, repository, tmp_path):
    found = find_installed(installation)
    found.check_servable(repository, read_manifest(repository))
    root = write_repository(artefacts, tmp_path / "r", target="onnxruntime")
    with pytest.raises(ServerError, match=r"needs Triton's backend 'onnxruntime'.*libtriton_onnxruntime\.so"):
        found.check_servable(root, read_manifest(root))


def test_steps_of_raw_texts_need_the_python_backend(installation, artefacts, tmp_path):
    library = installation / "backends" / "onnxruntime" / "libtriton_onnxruntime.so"
    library.parent.mkdir()
    library.touch()
    found = find_installed(installation)
    (installation / "backends" / "python" / "libtriton_python.so").unlink()
    plain = write_repository(artefacts, tmp_path / "plain", target="onnxruntime")
    found.check_servable(plain, read_manifest(plain))
    raw = write_repository(artefacts, tmp_path / "raw", target="onnxruntime", text_endpoint=True)
    with pytest.raises(ServerError, match="needs Triton's backend 'python'"):
        found.check_servable(raw, read_manifest(raw))
