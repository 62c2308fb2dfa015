"""Triton's numbered version folders: which stay, which go, and what the configurations say about them.

Members may stand in several versions beside each other; what clients ask (the ensemble, the single graph) has exactly
the newest, and the ensemble's steps name the versions they run, so that no answer mixes two exports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import CONFIG_FILE, PREDICTOR, SELECTOR, THREADS, read_config

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

MEMBERS = (SELECTOR, PREDICTOR)
"""The models that keep earlier versions."""
_MAY_DIFFER = ("version_policy", "dynamic_batching", "instance_group", "model_warmup")
"""Fields that a new export may change under the versions that stay; batches, too, unless engines are built for them."""


@dataclass(frozen=True)
class Versions:
    """The version folders of a repository."""

    current: int = 1
    """The newest, which is asked."""
    earlier: tuple[int, ...] = ()
    """Older versions of the members that stay beside it, ascending."""

    @property
    def members(self) -> tuple[int, ...]:
        """All versions of a member, ascending."""
        return (*self.earlier, self.current)

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Versions:
        """As a repository's manifest records them; of an export without a repository: the first."""
        described = manifest.get("repository", {})
        return cls(int(described.get("model_version", 1)), tuple(map(int, described.get("earlier", {}))))

    def after(self, keep: int) -> Versions:
        """What they are once a new version has come and ``keep`` of all stay."""
        first = max(len(self.members) + 1 - keep, 0)
        return Versions(self.current + 1, self.members[first:])


def newest_folder(root: Path) -> int:
    """The highest version number in any member's folder; 0 where there is none."""
    folders = (folder.name for name in MEMBERS for folder in Path(root).glob(f"{name}/*") if folder.is_dir())
    return max((int(name) for name in folders if name.isdecimal()), default=0)


def pin_versions(configs: Mapping[str, ModelConfig], versions: Versions) -> None:
    """Write the versions into the configurations: which a member serves, and which the ensemble's steps run."""
    for name, config in configs.items():
        served = versions.members if name in MEMBERS else (versions.current,)
        config.version_policy.specific.versions[:] = served
        for step in config.ensemble_scheduling.step:
            step.model_version = versions.current


def check_side_by_side(root: Path, configs: Mapping[str, ModelConfig]) -> None:
    """Raise RepositoryError where the versions in ``root`` cannot be served under the new configurations.

    A model's versions share one config.pbtxt, so they must agree in tensors, backend and limits.
    """
    for name in MEMBERS:
        differing = differing_fields(read_config(Path(root) / name / CONFIG_FILE), configs[name])
        if differing:
            raise RepositoryError(
                f"{root}: the earlier versions of {name} cannot stay beside the new one: {', '.join(differing)} "
                "differ, and all versions of a model share them; fix: --keep 1, or another --output"
            )


def differing_fields(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Names of the fields in which two versions of one model differ and must not, sorted; empty: they fit."""
    old, new = _comparable(old), _comparable(new)
    return sorted(field.name for field in new.DESCRIPTOR.fields if getattr(new, field.name) != getattr(old, field.name))


def _comparable(config: ModelConfig) -> ModelConfig:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    bare = ModelConfig()
    bare.CopyFrom(config)
    for field in _MAY_DIFFER:
        bare.ClearField(field)
    bare.parameters.pop(THREADS, None)  # the cores of the machine that exported
    if bare.backend != "tensorrt":
        bare.ClearField("max_batch_size")
    return bare
