"""What a reloading server reads: copies of its own of what was exported, which no export can pull from under it.

    <temporary folder>/1/ 2/ ...   whole copies of the exported repository, each held against its manifest
    <temporary folder>/models/     what Triton reads: one version at rest, two beside each other during an exchange
"""

from __future__ import annotations

import filecmp
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import CONFIG_FILE, config_text, read_config
from rekd_deploy.repository.reader import MANIFEST, check_repository, models_of, read_description
from rekd_deploy.repository.versions import Versions, pin_versions
from rekd_deploy.repository.workspaces import Workspace
from rekd_train.files import write_text

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_MODELS = "models"
_BYTECODE = "__pycache__"
"""As an empty file it keeps Python, whatever its version and settings, from writing bytecode beside a model: Triton
would take the version for changed, and load it again beside itself."""
_IGNORED = shutil.ignore_patterns(_BYTECODE)


@dataclass(frozen=True)
class Snapshot:
    """A whole copy of a repository at one moment. Do not change its files."""

    root: Path
    manifest: dict[str, Any]
    """Its manifest.json, to which every file was held."""

    @property
    def version(self) -> int:
        """The version that is asked."""
        return Versions.of(self.manifest).current

    @cached_property
    def configs(self) -> dict[str, ModelConfig]:
        """The configuration of each model, serving this version alone. Copy before you change one."""
        names = models_of(self.manifest["repository"]["files"])
        configs = {name: read_config(self.root / name / CONFIG_FILE) for name in names}
        pin_versions(configs, Versions(self.version))
        return configs

    @cached_property
    def description(self) -> ServedDescription:
        """Labels and preprocessing."""
        return read_description(self.root)


class LiveRepository:
    """The copies, and the folder that Triton reads.

    Args:
        repository: where exports are published.
    """

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._space: Workspace | None = None
        self._current: Snapshot | None = None
        self._copies = 0

    @property
    def models(self) -> Path:
        """What Triton reads."""
        return self._path / _MODELS

    @property
    def current(self) -> Snapshot:
        """What is served, and again after a restart."""
        if self._current is None:
            raise RepositoryError(f"{self.repository} has not been copied yet; call prepare() first")
        return self._current

    @current.setter
    def current(self, snapshot: Snapshot) -> None:
        self._current = snapshot

    def prepare(self) -> tuple[Path, dict[str, Any]]:
        """Lay out the folder for a server that starts: what was served last; at first, what is exported.

        Returns:
            A checked copy of the repository, and its manifest.

        Raises:
            RepositoryError: the repository is missing or damaged.
        """
        if self._current is None:
            self._current = self.snapshot()
        shutil.rmtree(self.models, ignore_errors=True)
        self.place(self._current)
        for name, config in self._current.configs.items():
            self.configure(name, config)
        return self._current.root, self._current.manifest

    def stamp(self) -> tuple[int, ...] | None:
        """Differs whenever something else is published; None while nothing is there."""
        try:
            found = (self.repository / MANIFEST).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def snapshot(self) -> Snapshot:
        """Copy the repository as it is now.

        Raises:
            RepositoryError: it is missing, damaged, or was exchanged meanwhile.
            OSError: there is no room.
        """
        check_repository(self.repository)
        self._copies += 1
        copy = self._path / str(self._copies)
        try:
            shutil.copytree(self.repository, copy, ignore=_IGNORED)
            return Snapshot(copy, check_repository(copy))
        except BaseException as error:
            shutil.rmtree(copy, ignore_errors=True)
            if isinstance(error, (FileNotFoundError, shutil.Error)):
                raise RepositoryError(f"{self.repository} changed while it was read; fix: try again") from None
            raise

    def place(self, snapshot: Snapshot) -> None:
        """Put a snapshot's version folders beside those that are there; what versions share is the newest one's."""
        version = str(snapshot.version)
        for name in snapshot.configs:
            target = self.models / name / version
            shutil.copytree(snapshot.root / name / version, target, copy_function=os.link)
            for shared in (snapshot.root / name).iterdir():
                if not shared.name.isdigit() and shared.name != CONFIG_FILE:
                    _put(shared, self.models / name / shared.name)
            for folder in {module.parent for module in target.rglob("*.py")}:
                (folder / _BYTECODE).touch()

    def configure(self, name: str, config: ModelConfig) -> None:
        """Write the configuration of a model."""
        write_text(self.models / name / CONFIG_FILE, config_text(config))

    def remove(self, snapshot: Snapshot) -> None:
        """Remove a snapshot and its version folders; models that have nothing else go whole."""
        for name in snapshot.configs:
            folder = self.models / name
            shutil.rmtree(folder / str(snapshot.version), ignore_errors=True)
            if folder.is_dir() and not any(entry.name.isdigit() for entry in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
        self.remove_copy(snapshot)

    def remove_copy(self, snapshot: Snapshot) -> None:
        """Remove a snapshot that was never placed."""
        shutil.rmtree(snapshot.root, ignore_errors=True)

    def close(self) -> None:
        """Remove all copies; safe to call twice."""
        if self._space is not None:
            self._space.close()
            self._space = self._current = None

    @property
    def _path(self) -> Path:
        if self._space is None:
            self._space = Workspace("rekd-live-")
        return self._space.path


def _put(source: Path, target: Path) -> None:
    """A file or folder under another name as well; each file is there at every moment, the old one or the new one.

    What is there already with the same content stays: Triton would take a newer file for a change of every version.
    """
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            _put(entry, target / entry.name)
        return
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    work = target.with_name(f".{target.name}")
    work.unlink(missing_ok=True)
    os.link(source, work)
    work.replace(target)
