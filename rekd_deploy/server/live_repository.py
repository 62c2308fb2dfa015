"""What a reloading server reads: copies of its own of what was exported, which no export can pull from under it.

    <temporary folder>/1/ 2/ ...   whole copies of the exported repository, each checked against its manifest
    <temporary folder>/models/     what Triton reads: one version at rest, two beside each other during an exchange
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import CONFIG_FILE, config_text, read_config
from rekd_deploy.repository.manifest import Versions, differing_fields, pin_versions
from rekd_deploy.repository.reader import MANIFEST, check_repository, models_of, read_description
from rekd_deploy.repository.workspaces import Workspace
from rekd_train.files import write_text

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_MODELS = "models"
_PYTHON = "python"
_BYTECODE = "__pycache__"
"""As an empty file it keeps Python, whatever its version and settings, from writing bytecode beside a model: Triton
would take the version for changed, and load it again beside itself."""
_IGNORED = shutil.ignore_patterns(_BYTECODE)


@dataclass(frozen=True)
class Snapshot:
    """A whole copy of a repository at one moment. Do not change its files."""

    root: Path
    manifest: dict[str, Any]
    """Its manifest.json, against which every file was checked."""

    @property
    def version(self) -> int:
        """The version that serves requests."""
        return Versions.of(self.manifest).current

    @cached_property
    def configs(self) -> dict[str, ModelConfig]:
        """The configuration of each model, serving this version alone. Copy before you change one."""
        names = models_of(self.manifest["repository"]["files"])
        configs = {name: read_config(self.root / name / CONFIG_FILE) for name in names}
        pin_versions(configs, Versions(self.version))
        return configs

    @property
    def ensembles(self) -> list[str]:
        """Models that only name the models that do the work."""
        return [name for name, config in self.configs.items() if config.ensemble_scheduling.step]

    @property
    def steps(self) -> list[str]:
        """The models that do the work."""
        return [name for name in self.configs if name not in self.ensembles]

    @cached_property
    def description(self) -> ServedDescription:
        """Labels and preprocessing, which connected clients know."""
        return read_description(self.root)


def reasons_not_to_exchange(old: Snapshot, new: Snapshot) -> list[str]:
    """Why clients, or Triton, could not go on if the new export took the old one's place; empty: they can."""
    reasons = []
    if new.version == old.version:
        reasons.append(f"it has the number {new.version} of the one that is served")
    if missing := sorted(set(old.configs) - set(new.configs)):
        reasons.append(f"it lacks {', '.join(missing)}, which clients may use")
    for name in sorted(set(old.configs) & set(new.configs)):
        before, after = old.configs[name], new.configs[name]
        if (name in old.ensembles) != (name in new.ensembles):
            reasons.append(f"{name} is another kind of model")
        elif name in new.ensembles:
            differing = [field for field in ("input", "output") if getattr(before, field) != getattr(after, field)]
            reasons += [f"{name} has another {field}" for field in differing]
        elif differing := differing_fields(before, after):
            reasons.append(f"{name} differs in {', '.join(differing)}, which all versions of a model share")
        if after.max_batch_size < before.max_batch_size:
            reasons.append(f"{name} takes {after.max_batch_size} in a request, {before.max_batch_size} until now")
    if new.description.labels != old.description.labels:
        reasons.append("its labels are others, and connected clients have those of before")
    if new.description.fingerprint != old.description.fingerprint:
        reasons.append("its preprocessing is another, and connected clients have that of before")
    return reasons


def model_processes(snapshot: Snapshot, models: Iterable[str]) -> int:
    """Processes that Triton's python backend runs for one version of each of these models."""
    groups = [group for name in models for group in _process_groups(snapshot.configs[name])]
    return sum(group.count * max(len(group.gpus), 1) for group in groups)


def processes_are_certain(old: Snapshot, new: Snapshot) -> bool:
    """Whether ``model_processes`` holds while both are served: the same instances, on CPUs or on named GPUs."""
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    both = [(old.configs[name], new.configs[name]) for name in old.steps]
    groups = [group for name in new.steps for group in _process_groups(new.configs[name])]
    return all(before.instance_group == after.instance_group for before, after in both) and all(
        group.kind == ModelInstanceGroup.KIND_CPU or group.gpus for group in groups
    )


def _process_groups(config: ModelConfig) -> Iterable[Any]:
    return config.instance_group if config.backend == _PYTHON else ()


class LiveRepository:
    """The copies, and the folder that Triton reads.

    Args:
        repository: where exports are published.
    """

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._space: Workspace | None = None
        self.current: Snapshot | None = None
        """What is served, and again after a restart; None before ``prepare``."""
        self._copies = 0

    @property
    def models(self) -> Path:
        """What Triton reads."""
        return self._path / _MODELS

    def prepare(self) -> tuple[Path, dict[str, Any]]:
        """Lay out the folder for a server that starts: what was served last; at first, what is exported.

        Returns:
            A checked copy of the repository, and its manifest.

        Raises:
            RepositoryError: the repository is missing or damaged.
        """
        if self.current is None:
            self.current = self.snapshot()
        shutil.rmtree(self.models, ignore_errors=True)
        self.place(self.current)
        for name in self.current.configs:
            self.configure(self.current, name)
        return self.current.root, self.current.manifest

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

    def configure(self, snapshot: Snapshot, name: str, beside: Sequence[int] = ()) -> None:
        """Write a model's configuration as in a snapshot, with other versions served beside its own."""
        from tritonclient.grpc.model_config_pb2 import ModelConfig

        config = ModelConfig()
        config.CopyFrom(snapshot.configs[name])
        config.version_policy.specific.versions[:] = sorted((snapshot.version, *beside))
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
            self._space = self.current = None

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
