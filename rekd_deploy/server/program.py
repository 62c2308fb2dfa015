"""A Triton server that is on this machine: in the wheel ``nvidia-pytriton``, or installed by someone else.

The wheel is found without importing it. Its python backend embeds the running Python: that needs the
stub of this minor version and libpython as a shared library, under the name that the stub was linked to.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

from rekd_deploy.errors import ServerError
from rekd_deploy.parity.engines import reason_not_to_run
from rekd_deploy.repository.config import CONFIG_FILE, read_config
from rekd_deploy.repository.reader import models_of
from rekd_deploy.runtimes.onnxruntime import check_flavours
from rekd_train.errors import MissingExtraError

_NAME = "tritonserver"
_STUB = "triton_python_backend_stub"
_UTILITIES = "triton_python_backend_utils.py"
_STRINGS = Path(__file__).parents[1] / "repository" / "backend" / "strings.py"
_WHEEL = "nvidia-pytriton==0.7.0"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARY = f"libpython{_PYTHON}.so.1.0"
_SYSTEM_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")


@dataclass(frozen=True)
class TritonProgram:
    """What a server is started from: an installation, with its own Python, or the wheel with the Python that runs."""

    executable: Path
    backends: Path
    """Folder with one folder for each backend."""
    stub: Path | None = None
    """Of the wheel: the python backend's process for this Python."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that it needs."""
    libraries: Mapping[str, Path] = field(default_factory=dict)
    """Of the wheel: shared libraries of this machine, by the names that its stub was linked to."""

    def place_backends(self, folder: Path) -> Path:
        """The folder of the backends; the wheel's python backend is copied into ``folder``, with its stub beside it."""
        if self.stub is None:
            return self.backends
        python = folder / "backends" / "python"
        shutil.copytree(self.backends / "python", python)
        shutil.copyfile(self.stub, python / _STUB)
        (python / _STUB).chmod(0o755)
        for name, library in self.libraries.items():
            (python / name).symlink_to(library)
        shutil.copyfile(_STRINGS, python / "rekd_strings.py")
        with open(python / _UTILITIES, "a", encoding="utf-8") as utilities:
            utilities.write("\n\nimport rekd_strings\n\nrekd_strings.mend_stub(globals())\n")
        return python.parent

    def environment(self, folder: Path) -> dict[str, str]:
        """Environment variables of the server process; ``folder``: where ``place_backends`` placed the backends."""
        variables = {**os.environ, **self.variables}
        if self.libraries:  # before the wheel's own
            variables["LD_LIBRARY_PATH"] = _path(folder / "backends" / "python", variables.get("LD_LIBRARY_PATH"))
        return variables

    def check_servable(self, root: Path, manifest: Mapping[str, Any]) -> None:
        """Raise ServerError if it cannot run the repository at ``root``, which has this manifest."""
        names = models_of(manifest["repository"]["files"])
        for backend in sorted({read_config(root / name / CONFIG_FILE).backend for name in names} - {""}):
            library = self.backends / backend / f"libtriton_{backend}.so"  # an ensemble has no backend
            if not library.is_file():
                raise ServerError(
                    f"{root} needs Triton's backend '{backend}', and there is no {library}; fix: rekd-export --target "
                    "for a backend that is there, or serve it with a Triton that has this one: in a container, or "
                    "with --tritonserver"
                )
        for role, entry in manifest["artefacts"].items():
            if self.stub and "engine" in entry and (reason := reason_not_to_run(entry["engine"])):
                product = entry["engine"]["format"]
                raise ServerError(f"{root} holds {product} engines, and that of the {role} cannot run here: {reason}")


def find_installed(path: Path) -> TritonProgram:
    """The server at ``path``: the executable, or the folder of the installation, with ``bin/tritonserver`` in it.

    Its backends lie in the folder ``backends`` beside the executable's. Raises ServerError where there is none.
    """
    path = Path(path).absolute()
    executable = path / "bin" / _NAME if path.is_dir() else path
    if not executable.is_file() or shutil.which(executable) is None:
        raise ServerError(
            f"{executable} is not an executable file; fix: --tritonserver with the path of {_NAME}, or of the folder "
            f"with bin/{_NAME} in it"
        )
    return TritonProgram(executable, executable.parents[1] / "backends")


def find_wheel() -> TritonProgram:
    """Locate the server of the wheel and check all that it needs.

    Raises:
        MissingExtraError: the wheel or ONNX Runtime is not installed.
        EngineError: ONNX Runtime is installed twice.
        ServerError: this machine or this Python cannot run it.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise ServerError(f"the embedded server runs on Linux x86-64; this is {sys.platform} {platform.machine()}")
    root = _server_folder()
    imports = [_package_folder("numpy", "serve").parent, _package_folder("onnxruntime", "cpu").parent]
    check_flavours()
    stub = root / "python_backend_stubs" / _PYTHON / _STUB
    if not stub.is_file():
        raise ServerError(f"nvidia-pytriton has no stub for Python {_PYTHON}; fix: use Python 3.11, 3.12 or 3.13")
    own = root.parents[1] / "nvidia_pytriton.libs"
    library = _python_library()
    # its own libpython lacks modules that the system's Python has built in
    linked = [path.name for path in own.glob(f"libpython3-*.{sys.version_info.minor}.so.1.0")]
    if linked and library is None:
        raise _no_shared_library()
    # the stub takes its Python from PATH and PYTHONPATH
    return TritonProgram(
        root / "bin" / _NAME, root / "backends", stub,
        {
            "LD_LIBRARY_PATH": _path(own, library and library.parent, os.environ.get("LD_LIBRARY_PATH")),
            "PATH": _path(Path(sys.executable).parent, os.environ.get("PATH")),
            "PYTHONPATH": _path(*dict.fromkeys(imports)),
            "PYTHONHOME": "",  # as if it were not set
        },
        dict.fromkeys(linked, library),
    )  # fmt: skip


def _server_folder() -> Path:
    """Where the wheel has its server; MissingExtraError: it is not installed."""
    try:
        return _package_folder("pytriton", "serve") / "tritonserver"
    except MissingExtraError as error:
        if sys.version_info < (3, 13):
            raise
        # it asks for NumPy 1, which knows no Python 3.13; nothing that it asks for is needed to run its server
        error.args = (f"the Python package 'pytriton' is not installed; fix: pip install --no-deps {_WHEEL}",)
        raise


def _package_folder(package: str, extra: str) -> Path:
    found = util.find_spec(package)
    if found is None or found.origin is None:
        raise MissingExtraError(package, extra)
    return Path(found.origin).resolve().parent


def _python_library() -> Path | None:
    """The shared libpython of this Python; None: the loader alone knows where it is."""
    folders = (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib")
    for folder in (*folders, *_SYSTEM_FOLDERS):
        if folder and (Path(folder) / _LIBRARY).is_file():
            return Path(folder) / _LIBRARY
    if ctypes.util.find_library(f"python{_PYTHON}"):
        return None
    raise _no_shared_library()


def _no_shared_library() -> ServerError:
    return ServerError(
        f"this Python has no shared library {_LIBRARY}, which Triton's python backend needs; fix: install Debian's "
        f"libpython{_PYTHON}, or use a Python built with --enable-shared (uv's and conda's are)"
    )


def _path(*folders: Path | str | None) -> str:
    return os.pathsep.join(str(folder) for folder in folders if folder)
