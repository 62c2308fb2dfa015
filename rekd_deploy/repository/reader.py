"""A model repository as it lies on disk: read, and checked against its manifest before it is served."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import (
    CONFIG_FILE,
    ENGINE,
    ENSEMBLE,
    PREDICTOR,
    SELECTOR,
    SINGLE,
    THREADS,
    parameters_of,
    read_config,
)
from rekd_deploy.repository.manifest import COMPONENTS, Versions
from rekd_deploy.repository.text_endpoint import ANSWER, PREPARE, RAW
from rekd_deploy.repository.warmups import WARMUP
from rekd_train.files import sha256

MANIFEST = "manifest.json"
REFERENCE = "parity.npz"
GRAPH = "model.onnx"
PLAN = "model.plan"
FORMAT = "rekd-repository"
FORMAT_VERSION = 1
GRAPH_MODELS = {"selector": SELECTOR, "predictor": PREDICTOR, "single": SINGLE}
"""The Triton model that runs each graph."""
MODELS = (SELECTOR, PREDICTOR, ENSEMBLE)
"""Always there."""
_OURS = {*MODELS, SINGLE, PREPARE, ANSWER, *RAW.values(), MANIFEST, REFERENCE, "README.md"}
"""What exports write at the top of a repository."""


def check_repository(root: Path) -> dict[str, Any]:
    """Check every file of a repository against its manifest.

    Returns:
        The manifest.

    Raises:
        RepositoryError: names the missing, altered or stray file.
    """
    root = Path(root)
    if not root.is_dir():
        raise RepositoryError(f"no model repository at {root}; fix: rekd-export CHECKPOINT --output {root}")
    manifest = read_manifest(root)
    files, versions = manifest["repository"]["files"], Versions.of(manifest)
    required = [f"{name}/{CONFIG_FILE}" for name in MODELS]
    required += [f"{name}/{versions.current}/{GRAPH}" for name in COMPONENTS]
    missing = [name for name in sorted({*required, *files}) if not (root / name).is_file()]
    if missing:
        raise RepositoryError(f"{root}: missing {', '.join(missing)}; fix: copy the whole folder again or rekd-export")
    found = {name: sha256(root / name) for name in files}
    altered = [name for name, digest in files.items() if found[name] != digest]
    if altered:
        raise RepositoryError(
            f"{root}: {', '.join(altered)} changed since the export (SHA-256 differs"
            f"{_swapped(altered, found, files)}); fix: rekd-export again"
        )
    models = models_of(files)
    stray = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name not in models)
    if stray:  # Triton takes every folder for a model and stops when it is none
        raise RepositoryError(f"{root}: folder {', '.join(stray)} is no model of this repository; fix: move it away")
    for name in models:
        folders = sorted(entry.name for entry in (root / name).iterdir() if entry.is_dir() and entry.name != WARMUP)
        wanted = sorted(map(str, versions.components if name in COMPONENTS else (versions.current,)))
        if folders != wanted:
            raise RepositoryError(
                f"{root / name}: version folders are {', '.join(folders)}, the manifest has {', '.join(wanted)}; fix: "
                "move the others away"
            )
    return manifest


def read_manifest(root: Path) -> dict[str, Any]:
    """manifest.json of a repository.

    Raises:
        RepositoryError: missing, damaged or of another version.
    """
    path = Path(root) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        described = manifest["repository"]
        complete = isinstance(described["files"], dict) and described["format"] == FORMAT
        version = described["version"]
        Versions.of(manifest)
    except FileNotFoundError:
        raise RepositoryError(
            f"{root} holds no exported model ({MANIFEST} is missing); fix: rekd-export CHECKPOINT --output {root}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RepositoryError(f"{path} is damaged ({error!r}); fix: copy it again or rekd-export") from None
    if not complete or version != FORMAT_VERSION:
        raise RepositoryError(
            f"{path} has format version {version}; this rekd reads {FORMAT_VERSION}; fix: rekd-export again"
        )
    return manifest


def graph_path(root: Path, manifest: Mapping[str, Any], role: str) -> Path:
    """The graph of a role ('selector', 'predictor', 'single') in the version that serves requests."""
    return Path(root) / GRAPH_MODELS[role] / str(Versions.of(manifest).current) / GRAPH


def plan_path(root: Path, manifest: Mapping[str, Any], role: str) -> Path:
    """The engine of a role beside its graph."""
    return graph_path(root, manifest, role).with_name(PLAN)


def read_description(root: Path) -> ServedDescription:
    """Labels and preprocessing of the model in a repository.

    Raises:
        RepositoryError: missing or unreadable.
    """
    return ServedDescription.from_parameters(parameters_of(read_config(Path(root) / ENSEMBLE / CONFIG_FILE)))


def models_of(files: Iterable[str]) -> tuple[str, ...]:
    """The models of a repository with these files: those that are always there, and those that were chosen."""
    configured = {name.partition("/")[0] for name in files if name.endswith(f"/{CONFIG_FILE}")}
    return (*MODELS, *sorted(configured - set(MODELS)))


def _swapped(altered: Iterable[str], found: Mapping[str, str], files: Mapping[str, str]) -> str:
    """Which of the altered files hold another's content."""
    owners = {digest: name for name, digest in files.items()}
    return "".join(f"; {name} is the content of {owners[found[name]]}" for name in altered if found[name] in owners)


def served_sessions(root: Path) -> dict[str, Any]:
    """How a repository's server opens ONNX Runtime's sessions: ``target`` and ``threads`` of ``OnnxRuntimeRunner``."""
    config = read_config(root / GRAPH_MODELS["selector"] / CONFIG_FILE)
    return {"target": config.backend, "threads": int(parameters_of(config).get(THREADS, 0)) or None}


def served_device(root: Path) -> str:
    """Where Triton runs the graphs: 'cpu' or 'cuda'; 'cpu' where they are run by none, beside engines."""
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    config = read_config(root / GRAPH_MODELS["selector"] / CONFIG_FILE)
    on_gpu = any(group.kind == ModelInstanceGroup.KIND_GPU for group in config.instance_group)
    by_onnx_runtime = config.backend != "tensorrt" and ENGINE not in parameters_of(config)
    return "cuda" if on_gpu and by_onnx_runtime else "cpu"


def refuse_foreign_folder(root: Path) -> None:
    """Raise RepositoryError where writing a repository at ``root`` would destroy something else."""
    root = Path(root)
    if root.is_dir():
        foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in _OURS)
        if foreign:
            raise RepositoryError(
                f"{root} holds {', '.join(foreign[:5])}, which is no part of a model repository and would be lost; "
                "fix: choose an empty or new folder"
            )
    elif root.exists():
        raise RepositoryError(f"{root} is a file; fix: choose a folder")
