"""A Triton server that is on this machine: in the wheel ``nvidia-pytriton``, or installed by someone else.

The wheel is found without importing it. Its python backend embeds the running Python: that needs the
stub of this minor version, libpython as a shared library, and NumPy older than 2.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import stat
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rekd_deploy.errors import ServerError
from rekd_deploy.parity.engines import reason_not_to_run
from rekd_deploy.repository.config import CONFIG_FILE, read_config
from rekd_deploy.repository.reader import models_of
from rekd_deploy.runtimes.onnxruntime import check_flavours
from rekd_train.errors import MissingExtraError, install_command

_NAME = "tritonserver"
_SHARED_LIBRARY = "libtriton_{}.so"
_STUB = "triton_python_backend_stub"


class TritonProgram(ABC):
    """What a server is started from."""

    has_gpu_metrics: bool
    """Whether it may look for GPUs to report about."""
    executable: Path
    """The server."""
    caches: Path | None
    """Folder of the response caches; None: the server looks for them itself."""

    @abstractmethod
    def place_backends(self, folder: Path) -> Path:
        """The folder of the backends; what has to be prepared for this Python is put into ``folder``."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Environment variables of the server process."""

    @abstractmethod
    def check_servable(self, root: Path, manifest: Mapping[str, Any]) -> None:
        """Raise ServerError if it cannot run a repository.

        Args:
            root: the repository.
            manifest: what its manifest.json says.
        """


@dataclass(frozen=True)
class InstalledTriton(TritonProgram):
    """A server that someone has installed: its own backends, its own Python, the environment as it is."""

    executable: Path
    backends: Path
    """Folder with one folder for each backend."""

    has_gpu_metrics = True

    @property
    def caches(self) -> Path | None:
        folder = self.executable.parents[1] / "caches"
        return folder if folder.is_dir() else None

    def place_backends(self, folder: Path) -> Path:
        return self.backends

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def check_servable(self, root: Path, manifest: Mapping[str, Any]) -> None:
        names = models_of(manifest["repository"]["files"])
        wanted = {read_config(root / name / CONFIG_FILE).backend for name in names} - {""}  # an ensemble has none
        missing = sorted(
            name for name in wanted if not (self.backends / name / _SHARED_LIBRARY.format(name)).is_file()
        )
        if missing:
            raise ServerError(
                f"{root} needs Triton's backend '{missing[0]}', and {self.backends} has no {missing[0]}/"
                f"{_SHARED_LIBRARY.format(missing[0])}; fix: install it, name another folder with --backends, or "
                "rekd-export --target for a backend that is there"
            )


def find_installed(path: Path, backends: Path | None = None) -> InstalledTriton:
    """The server at ``path``.

    Args:
        path: the executable, or the folder of the installation, with ``bin/tritonserver`` in it.
        backends: folder of the backends; None: ``backends`` beside the executable's folder.

    Raises:
        ServerError: there is no executable, or no folder of backends.
    """
    path = Path(path).absolute()
    executable = path / "bin" / _NAME if path.is_dir() else path
    if not executable.is_file() or shutil.which(executable) is None:
        raise ServerError(
            f"{executable} is not an executable file; fix: --tritonserver with the path of {_NAME}, or of the folder "
            f"with bin/{_NAME} in it"
        )
    folder = Path(backends).absolute() if backends is not None else executable.parents[1] / "backends"
    if not folder.is_dir():
        raise ServerError(f"there is no folder {folder} with Triton's backends; fix: name it with --backends")
    return InstalledTriton(executable, folder)


@dataclass(frozen=True)
class TritonWheel(TritonProgram):
    """The server of the wheel, with the Python that runs."""

    root: Path
    """``pytriton/tritonserver`` in site-packages."""
    libraries: Path
    """``nvidia_pytriton.libs``, shared libraries of server and stub."""
    python_library: Path | None
    """Folder of libpython; None: the loader finds it by itself."""
    site_packages: tuple[Path, ...]
    """Where NumPy and ONNX Runtime are imported from."""

    has_gpu_metrics = False

    @property
    def executable(self) -> Path:
        return self.root / "bin" / _NAME

    @property
    def caches(self) -> Path:
        return self.root / "caches"

    def place_backends(self, folder: Path) -> Path:
        """Copy the python backend into ``folder`` and put this Python's stub beside it."""
        backend = folder / "backends" / "python"
        shutil.copytree(self.root / "backends" / "python", backend, ignore=shutil.ignore_patterns("__pycache__"))
        stub = backend / _STUB
        shutil.copyfile(self._stub, stub)
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        return backend.parent

    def environment(self) -> dict[str, str]:
        """Environment variables of the server process: the stub takes its Python from PATH and PYTHONPATH."""
        libraries = [self.libraries, *([self.python_library] if self.python_library else [])]
        environment = dict(os.environ)
        environment.pop("PYTHONHOME", None)
        environment["LD_LIBRARY_PATH"] = _path(libraries, environment.get("LD_LIBRARY_PATH"))
        environment["PATH"] = _path([Path(sys.executable).parent], environment.get("PATH"))
        environment["PYTHONPATH"] = _path(self.site_packages, None)
        return environment

    def check_servable(self, root: Path, manifest: Mapping[str, Any]) -> None:
        target = manifest["repository"]["target"]
        if target != "python":
            raise ServerError(
                f"{root} is for Triton's backend '{target}', which the server of the wheel lacks; fix: serve it in a "
                "Triton container, with --tritonserver PATH, or rekd-export --target python"
            )
        for role, entry in manifest["artefacts"].items():
            if "engine" in entry and (reason := reason_not_to_run(entry["engine"])):
                product = entry["engine"]["format"]
                raise ServerError(f"{root} holds {product} engines, and that of the {role} cannot run here: {reason}")

    @property
    def _stub(self) -> Path:
        return self.root / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / _STUB


def find_wheel() -> TritonWheel:
    """Locate the server and check all that it needs.

    Raises:
        MissingExtraError: the wheel or ONNX Runtime is not installed.
        EngineError: ONNX Runtime is installed twice.
        ServerError: this machine or this Python cannot run it.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise ServerError(f"the embedded server runs on Linux x86-64; this is {sys.platform} {platform.machine()}")
    root = _package_folder("pytriton", "serve") / "tritonserver"
    wheel = TritonWheel(
        root=root,
        libraries=root.parents[1] / "nvidia_pytriton.libs",
        python_library=_python_library(),
        site_packages=tuple(
            dict.fromkeys(_package_folder(*each).parent for each in (("numpy", "serve"), ("onnxruntime", "cpu")))
        ),
    )
    check_flavours()
    version = metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy {version} is installed, but Triton's python backend needs numpy < 2 (its answers would be empty); "
            f"fix: {install_command('serve')}"
        )
    if not wheel._stub.is_file():
        raise ServerError(
            f"nvidia-pytriton has no stub for Python {sys.version_info.major}.{sys.version_info.minor}; "
            "fix: use Python 3.11 or 3.12"
        )
    for part in (wheel.executable, wheel.root / "backends" / "python", wheel.libraries):
        if not part.exists():
            raise ServerError(f"{part} is missing; fix: pip install --force-reinstall nvidia-pytriton==0.7.0")
    return wheel


def _package_folder(package: str, extra: str) -> Path:
    found = util.find_spec(package)
    if found is None or found.origin is None:
        raise MissingExtraError(package, extra)
    return Path(found.origin).resolve().parent


def _python_library() -> Path | None:
    """Folder of the shared libpython that the stub links to.

    Raises:
        ServerError: this Python has none.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib", Path(sys.base_exec_prefix) / "lib"]
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return Path(folder)
    if ctypes.util.find_library(f"python{sys.version_info.major}.{sys.version_info.minor}"):
        return None
    raise ServerError(
        f"this Python has no shared library {name}, which Triton's python backend needs; fix: install Debian's "
        f"libpython3.{sys.version_info.minor}, or use a Python built with --enable-shared (uv's and conda's are)"
    )


def _path(folders: list[Path] | tuple[Path, ...], rest: str | None) -> str:
    return os.pathsep.join([*map(str, folders), *([rest] if rest else [])])
