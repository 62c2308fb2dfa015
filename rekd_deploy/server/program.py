"""A Triton server that is on this machine: in the wheel ``nvidia-pytriton``, or installed by someone else."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.errors import ServerError
from rekd_deploy.repository.config import CONFIG_FILE, read_config
from rekd_deploy.repository.reader import models_of

_NAME = "tritonserver"
_SHARED_LIBRARY = "libtriton_{}.so"


class TritonProgram(ABC):
    """What a server is started from."""

    has_gpu_metrics: bool
    """Whether it may look for GPUs to report about."""

    @property
    @abstractmethod
    def executable(self) -> Path:
        """The server."""

    @property
    @abstractmethod
    def caches(self) -> Path | None:
        """Response caches; None: it looks for them itself."""

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

    path: Path
    """The executable."""
    backends: Path
    """Folder with one folder for each backend."""

    has_gpu_metrics = True

    @property
    def executable(self) -> Path:
        return self.path

    @property
    def caches(self) -> Path | None:
        folder = self.path.parents[1] / "caches"
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
