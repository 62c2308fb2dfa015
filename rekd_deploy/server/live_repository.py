"""What a reloading server reads, and the interface through which it is told to load it.

It reads copies of its own of what was exported, which no export can pull from under it:

    <temporary folder>/1/ 2/ ...   whole copies of the exported repository, each checked against its manifest
    <temporary folder>/models/     what Triton reads: one version at rest, two beside each other during an exchange
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import RepositoryError, ServerError
from rekd_deploy.repository.config import CONFIG_FILE, ENSEMBLE, config_text, parameters_of, read_config
from rekd_deploy.repository.manifest import Versions, differing_fields, pin_versions
from rekd_deploy.repository.reader import MANIFEST, check_repository, models_of
from rekd_deploy.repository.workspaces import Workspace
from rekd_deploy.server.flags import GRPC_KEY_HEADER
from rekd_train.files import write_bytes, write_text

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_LOAD_SECONDS = 600.0
_BYTECODE = "__pycache__"
"""As an empty file it keeps Python, whatever its version and settings, from writing bytecode beside a model: Triton
would take the version for changed, and load it again beside itself."""


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


def reasons_not_to_exchange(old: Snapshot, new: Snapshot) -> list[str]:
    """Why clients, or Triton, could not go on if the new export took the old one's place; empty: they can."""
    reasons = []
    if new.version == old.version:
        reasons.append(f"it has the number {new.version} of the one that is served")
    for name, before in old.configs.items():
        after = new.configs.get(name)
        if after is None:
            reasons.append(f"it lacks {name}")
            continue
        if name in old.ensembles:
            differing = [field for field in ("input", "output") if getattr(before, field) != getattr(after, field)]
        else:
            differing = differing_fields(before, after)
        if differing:
            reasons.append(f"{name} differs in {', '.join(differing)}")
        if after.max_batch_size < before.max_batch_size:
            reasons.append(f"{name} takes {after.max_batch_size} in a request, {before.max_batch_size} until now")
    known, served = (ServedDescription.from_parameters(parameters_of(each.configs[ENSEMBLE])) for each in (old, new))
    if not served.reads_as(known):
        reasons.append("its labels or its preprocessing are not those that connected clients have")
    return reasons


def checked_copy(repository: Path, copy: Path) -> dict[str, Any]:
    """Copy a repository as it is now; the manifest, against which the copy was checked.

    Raises RepositoryError if it is missing, damaged, or was exchanged meanwhile, or if there is no room.
    """
    check_repository(repository)
    try:
        shutil.copytree(repository, copy)
        return check_repository(copy)
    except BaseException as error:
        shutil.rmtree(copy, ignore_errors=True)
        if isinstance(error, OSError) and f"[Errno {errno.ENOSPC}]" in str(error):
            where = f"{copy.parents[1]} has no room for a copy of {repository}"
            raise RepositoryError(f"{where}; fix: make room, or start it with another TMPDIR") from None
        if isinstance(error, (FileNotFoundError, shutil.Error)):
            raise RepositoryError(f"{repository} changed while it was read; fix: try again") from None
        raise


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
        """What Triton reads; there once ``prepare`` has been called."""
        return self._space.path / "models"

    def prepare(self) -> tuple[Path, dict[str, Any]]:
        """Lay out the folder for a server that starts: what was served last; at first, what is exported.

        Returns a checked copy of the repository, and its manifest; raises RepositoryError as ``snapshot`` does.
        """
        if self.current is None:
            self._space = self._space or Workspace("rekd-live-")
            self.current = self.snapshot()
        for folder in filter(Path.is_dir, self._space.path.iterdir()):
            if folder != self.current.root:
                shutil.rmtree(folder, ignore_errors=True)
        self.place(self.current)
        for name in self.current.configs:
            self.configure(self.current, name)
        return self.current.root, self.current.manifest

    def published(self) -> dict[str, Any] | None:
        """The manifest of what is exported now; None while there is none."""
        try:
            return json.loads((self.repository / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return None

    def snapshot(self) -> Snapshot:
        """The repository as it is now; raises as ``checked_copy``."""
        self._copies += 1
        copy = self._space.path / str(self._copies)
        return Snapshot(copy, checked_copy(self.repository, copy))

    def place(self, snapshot: Snapshot) -> None:
        """Put a snapshot's version folders beside those that are there; what versions share is the newest one's."""
        version = str(snapshot.version)
        for name in snapshot.configs:
            source, target = snapshot.root / name, self.models / name
            ignored = shutil.ignore_patterns(_BYTECODE)
            shutil.copytree(source / version, target / version, ignore=ignored, copy_function=os.link)
            (target / version / _BYTECODE).touch()
            for file in filter(Path.is_file, source.rglob("*")):
                shared = target / file.relative_to(source)
                if shared.relative_to(target).parts[0].isdigit() or shared.name == CONFIG_FILE:
                    continue
                # Triton would take a newer file for a change of every version
                if not (shared.is_file() and filecmp.cmp(file, shared, shallow=False)):
                    shared.parent.mkdir(exist_ok=True)
                    write_bytes(shared, file.read_bytes())

    def configure(self, snapshot: Snapshot, name: str, beside: Sequence[int] = ()) -> None:
        """Write a model's configuration as in a snapshot, with other versions served beside its own."""
        from tritonclient.grpc.model_config_pb2 import ModelConfig

        config = ModelConfig()
        config.CopyFrom(snapshot.configs[name])
        config.version_policy.specific.versions[:] = sorted((snapshot.version, *beside))
        write_text(self.models / name / CONFIG_FILE, config_text(config))

    def remove(self, snapshot: Snapshot) -> None:
        """Remove a snapshot, and its version folders unless the served one has that number."""
        shutil.rmtree(snapshot.root, ignore_errors=True)
        if snapshot.version != self.current.version:
            for name in snapshot.configs:
                shutil.rmtree(self.models / name / str(snapshot.version), ignore_errors=True)

    def close(self) -> None:
        """Remove all copies; safe to call twice."""
        if self._space is not None:
            self._space.close()
            self._space = self.current = None


@contextmanager
def model_control(grpc_url: str, key: str) -> Iterator[Callable[..., Any]]:
    """A function that calls a method of tritonclient's gRPC client with the key; it raises ServerError.

    Over gRPC, where loading holds up no response: over HTTP it would hold up the connections that share its thread.
    """
    import tritonclient.grpc
    from tritonclient.utils import InferenceServerException

    def call(method: str, *arguments: str) -> Any:
        try:
            return getattr(client, method)(*arguments, headers={GRPC_KEY_HEADER: key}, client_timeout=_LOAD_SECONDS)
        except InferenceServerException as error:
            reason = " ".join(str(error.message()).split())
            raise ServerError(f"the server refused {' '.join((method, *arguments))}: {reason}") from None

    with tritonclient.grpc.InferenceServerClient(grpc_url) as client:
        yield call
