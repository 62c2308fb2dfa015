"""Runs programs of tests/standin in the environment with ONNX Runtime's real CUDA provider, on a CUDA that pretends."""

import atexit
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-gpu" / "bin" / "python"
LIBRARIES = ("libcuda.so.1", "libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10",
             "libcudnn.so.9")  # fmt: skip
"""What the provider loads; the stand-in is all of them."""


@cache
def libraries() -> Path:
    """The folder with the stand-in; without gcc or the environment the test is skipped."""
    if not (PYTHON.parents[1] / "installed").exists():
        pytest.skip("there is no environment .venv-gpu; fix: make environment")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc; fix: apt-get install gcc libc6-dev")
    folder = _folder()
    (headers,) = PYTHON.parents[1].glob("lib/python*/site-packages/nvidia/cu*/include")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", f"-I{headers}", "-o", folder / "standin.so",
         ROOT / "tests" / "standin" / "cuda_standin.c"],
        check=True)
    for name in LIBRARIES:
        (folder / name).symlink_to("standin.so")
    return folder


def _folder() -> Path:
    folder = mkdtemp(prefix="rekd-standin-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def packages() -> Path:
    """A folder with links to all that this interpreter has besides ONNX Runtime; the environment has no torch, say."""
    folder = _folder()
    for path in Path(pytest.__file__).parents[1].iterdir():
        if not path.name.startswith(("onnxruntime", "__editable__", "rekd_")) and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


def process(
    *command: str | Path, without: str = "", borrowing: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """What became of the environment's Python with a command line and further environment variables.

    Without one of the libraries; ``borrowing`` the packages of this interpreter.
    """
    folder = libraries()
    if without:
        folder = shutil.copytree(folder, _folder(), symlinks=True, dirs_exist_ok=True)
        (folder / without).unlink()
    path = f"{ROOT}{os.pathsep}{packages()}" if borrowing else str(ROOT)
    own = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    environment = {**own, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": path, **variables}
    return subprocess.run([PYTHON, *command], env=environment, capture_output=True, text=True, timeout=300)


def run(program: str, *arguments: str | Path, **options: Any) -> list[Any]:
    """The JSON lines that a program prints; options are those of ``process``."""
    done = process(ROOT / "tests" / "standin" / program, *arguments, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
