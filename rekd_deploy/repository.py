"""A model repository for Triton: written whole or not at all, checked before it is served.

    ROOT/manifest.json                      what was exported, and the SHA-256 of every file below
    ROOT/rekd_selector/config.pbtxt         member, with 1/model.onnx and 1/model.py
    ROOT/rekd_predictor/config.pbtxt        member, likewise
    ROOT/rekd_single/config.pbtxt           both steps in one graph, if it was exported; likewise
    ROOT/rekd/config.pbtxt                  ensemble, with an empty version folder (Triton requires it)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rekd_deploy.artefacts import Artefacts
from rekd_deploy.config_rules import config_mistakes, graph_mistakes
from rekd_deploy.errors import RepositoryError
from rekd_deploy.served import ServedDescription
from rekd_deploy.triton_config import (
    CONFIG_FILE,
    ENSEMBLE,
    PREDICTOR,
    SELECTOR,
    SINGLE,
    ServingSettings,
    build_configs,
    config_text,
    parameters_of,
    read_config,
)
from rekd_train.files import atomic_directory, sha256, write_json, write_text

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
FORMAT = "rekd-repository"
FORMAT_VERSION = 1
GRAPH_MODELS = {"selector": SELECTOR, "predictor": PREDICTOR, "single": SINGLE}
"""The Triton model that runs each graph."""
_MODELS = (SELECTOR, PREDICTOR, ENSEMBLE)
"""Always there."""
_OURS = {*_MODELS, SINGLE, MANIFEST, "README.md"}


def write_repository(
    artefacts: Artefacts,
    root: Path,
    *,
    target: str = "python",
    max_batch_size: int = 64,
    instances: int = 1,
    threads: int = 0,
    queue_delay_us: int = 100,
) -> Path:
    """Place verified graphs in a repository that Triton serves.

    Args:
        root: the repository; an older one there is replaced, anything else is refused.
        target: which backend runs the graphs.
        max_batch_size: most texts or images in one request and in one dynamic batch.
        instances: processes of each member.
        threads: threads of each process inside one operation; 0: one a core.
        queue_delay_us: microseconds a request may wait for others to form a preferred batch.

    Raises:
        RepositoryError: the folder holds something else, or configs and graphs do not fit each other.
        ConfigError: a number is out of range.
    """
    settings = ServingSettings(
        max_batch_size=max_batch_size, instances=instances, threads=threads, queue_delay_us=queue_delay_us
    )
    root = Path(root)
    refuse_foreign_folder(root)
    configs = build_configs(artefacts, settings, target)
    graphs = {GRAPH_MODELS[role]: path for role, path in artefacts.graphs.items()}
    mistakes = config_mistakes(configs)
    for name, graph in graphs.items():
        mistakes += graph_mistakes(configs[name], graph)
    if mistakes:
        raise RepositoryError("the repository would not load: " + "; ".join(mistakes))
    with atomic_directory(root) as work:
        for name, config in configs.items():
            (work / name / "1").mkdir(parents=True)
            write_text(work / name / CONFIG_FILE, config_text(config))
        for name, graph in graphs.items():
            _place_graph(graph, work / name / "1")
            shutil.copyfile(Path(__file__).with_name("triton_model.py"), work / name / "1" / "model.py")
        (work / ENSEMBLE / "1" / ".gitkeep").touch()
        files = {path.relative_to(work).as_posix(): sha256(path) for path in sorted(work.rglob("*")) if path.is_file()}
        described = {"format": FORMAT, "version": FORMAT_VERSION, "target": target, "files": files}
        write_json(work / MANIFEST, {**artefacts.manifest, "repository": described})
    return root


def check_repository(root: Path) -> dict[str, Any]:
    """Hold every file of a repository against its manifest, and its configs against the rules.

    Returns:
        The manifest.

    Raises:
        RepositoryError: names the missing, altered or stray file, or the mistakes in the configs.
    """
    root = Path(root)
    if not root.is_dir():
        raise RepositoryError(f"no model repository at {root}; fix: rekd-export CHECKPOINT --output {root}")
    manifest = read_manifest(root)
    files = manifest["repository"]["files"]
    required = [f"{name}/{CONFIG_FILE}" for name in _MODELS] + [f"{name}/1/{GRAPH}" for name in (SELECTOR, PREDICTOR)]
    missing = [name for name in sorted({*required, *files}) if not (root / name).is_file()]
    if missing:
        raise RepositoryError(f"{root}: missing {', '.join(missing)}; fix: copy the whole folder again or rekd-export")
    altered = [name for name, digest in files.items() if sha256(root / name) != digest]
    if altered:
        raise RepositoryError(
            f"{root}: {', '.join(altered)} changed since the export (SHA-256 differs); fix: rekd-export again"
        )
    models = _models(files)
    stray = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name not in models)
    if stray:  # Triton takes every folder for a model and stops when it is none
        raise RepositoryError(f"{root}: folder {', '.join(stray)} is no model of this repository; fix: move it away")
    for name in models:
        versions = sorted(entry.name for entry in (root / name).iterdir() if entry.is_dir())
        if versions != ["1"]:
            raise RepositoryError(f"{root / name}: version folders are {versions}; there must be exactly one, '1'")
    mistakes = config_mistakes({name: read_config(root / name / CONFIG_FILE) for name in models})
    if mistakes:
        raise RepositoryError(f"{root} would not load: " + "; ".join(mistakes))
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


def read_description(root: Path) -> ServedDescription:
    """Labels and preprocessing of the model in a repository.

    Raises:
        RepositoryError: missing or unreadable.
    """
    return ServedDescription.from_parameters(parameters_of(read_config(Path(root) / ENSEMBLE / CONFIG_FILE)))


def _models(files: Iterable[str]) -> tuple[str, ...]:
    """The models of a repository with these files."""
    return (*_MODELS, SINGLE) if f"{SINGLE}/{CONFIG_FILE}" in files else _MODELS


def _place_graph(graph: Path, folder: Path) -> None:
    shutil.copyfile(graph, folder / GRAPH)
    weights = graph.with_name(graph.name + ".data")
    if weights.is_file():  # the graph names this file, so it keeps its name
        shutil.copyfile(weights, folder / weights.name)


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
