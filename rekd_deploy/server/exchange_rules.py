"""Which export may take another's place while clients go on asking, and what both are served under meanwhile. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.repository.versions import differing_fields

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

PYTHON = "python"
_ASKED = ("input", "output")
"""What clients of an ensemble rely on."""


def reasons_not_to_exchange(
    old: Mapping[str, ModelConfig],
    new: Mapping[str, ModelConfig],
    old_description: ServedDescription,
    new_description: ServedDescription,
) -> list[str]:
    """Why clients, or Triton, could not go on if the new export took the old one's place; empty: they can.

    Args:
        old: configuration of each model that is served, by name.
        new: of each model of the new export.
        old_description: labels and preprocessing that connected clients know.
        new_description: those of the new export.
    """
    reasons = []
    if missing := sorted(set(old) - set(new)):
        reasons.append(f"it lacks {', '.join(missing)}, which clients may be asking")
    for name in sorted(set(old) & set(new)):
        if is_ensemble(new[name]) != is_ensemble(old[name]):
            reasons.append(f"{name} is another kind of model")
        elif is_ensemble(new[name]):
            differing = [field for field in _ASKED if getattr(old[name], field) != getattr(new[name], field)]
            reasons += [f"{name} has another {field}" for field in differing]
        elif differing := differing_fields(old[name], new[name]):
            reasons.append(f"{name} differs in {', '.join(differing)}, which all versions of a model share")
        if new[name].max_batch_size < old[name].max_batch_size:
            reasons.append(
                f"{name} takes {new[name].max_batch_size} in a request, {old[name].max_batch_size} until now"
            )
    if new_description.labels != old_description.labels:
        reasons.append("its labels are others, and connected clients have those of before")
    if new_description.fingerprint != old_description.fingerprint:
        reasons.append("its preprocessing is another, and connected clients have that of before")
    return reasons


def side_by_side(new: ModelConfig, versions: tuple[int, ...]) -> ModelConfig:
    """The configuration under which a model serves these versions at once: the new one's, with all of them."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = ModelConfig()
    config.CopyFrom(new)
    config.version_policy.specific.versions[:] = sorted(versions)
    return config


def model_processes(configs: Mapping[str, ModelConfig], models: Iterable[str]) -> int:
    """Processes that Triton's python backend runs for one version of each of these models, on CPUs."""
    chosen = (configs[name] for name in models)
    return sum(group.count for config in chosen if config.backend == PYTHON for group in config.instance_group)


def is_ensemble(config: ModelConfig) -> bool:
    """Whether it only names the models that do the work."""
    return bool(config.ensemble_scheduling.step)
