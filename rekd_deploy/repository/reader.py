"""A model repository as it lies on disk: read, checked against its manifest, run in this process. torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.contract.description import Artefacts, ServedDescription
from rekd_deploy.contract.signature import PairSignature
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository import config
from rekd_deploy.repository.build import largest_batch
from rekd_deploy.repository.config import CONFIG_FILE, GRAPH_MODELS, MANIFEST, PLAN, SELECTOR
from rekd_deploy.repository.manifest import Versions, signature_from_dict, verify_files
from rekd_deploy.runtimes.base import Graph, Runner
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_deploy.runtimes.tensorrt import TensorRTRunner, check_engine_file, is_built
from rekd_train.files import sha256

FORMAT, FORMAT_VERSION = "rekd-repository", 1
_OURS = {*config.MODELS, config.SINGLE, *config.FORMER, *config.ENDPOINTS.values()}
_OURS |= {MANIFEST, config.REFERENCE, "README.md"}
"""What exports write at the top of a repository."""


def check_repository(root: Path) -> dict[str, Any]:
    """The manifest, once every file has been checked against it; RepositoryError names what is missing or altered."""
    if not root.is_dir():
        raise RepositoryError(f"no model repository at {root}; fix: rekd-export CHECKPOINT --output {root}")
    manifest = read_manifest(root)
    files, versions = manifest["repository"]["files"], Versions.of(manifest)
    graphs = [f"{name}/{versions.current}/{config.GRAPH}" for name in config.COMPONENTS]
    required = {*(f"{name}/{CONFIG_FILE}" for name in config.MODELS), *graphs, *files}
    if missing := sorted(name for name in required if not (root / name).is_file()):
        raise RepositoryError(f"{root}: missing {', '.join(missing)}; fix: copy the whole folder again or rekd-export")
    found = {name: sha256(root / name) for name in files}
    if altered := [name for name, digest in files.items() if found[name] != digest]:
        owners = {digest: name for name, digest in files.items()}
        swapped = [f"; {name} is the content of {owners[found[name]]}" for name in altered if found[name] in owners]
        raise RepositoryError(
            f"{root}: {', '.join(altered)} changed since the export (SHA-256 differs{''.join(swapped)}); fix: "
            "rekd-export again"
        )
    models = models_of(files)
    stray = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name not in models)
    if stray:  # Triton takes every folder for a model and stops when it is none
        raise RepositoryError(f"{root}: folder {', '.join(stray)} is no model of this repository; fix: move it away")
    for name in models:
        folders = sorted({entry.name for entry in (root / name).iterdir() if entry.is_dir()} - {config.WARMUP})
        wanted = sorted(map(str, versions.components if name in config.COMPONENTS else (versions.current,)))
        if folders != wanted:
            raise RepositoryError(
                f"{root / name}: version folders are {', '.join(folders)}, the manifest has {', '.join(wanted)}; fix: "
                "move the others away"
            )
    return manifest


def read_manifest(root: Path) -> dict[str, Any]:
    """manifest.json of a repository; RepositoryError: missing, damaged or of another version."""
    path = Path(root) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        described = manifest["repository"]
        ours = isinstance(described["files"], dict) and described["format"] == FORMAT
        version = described["version"]
        Versions.of(manifest)
    except FileNotFoundError:
        raise RepositoryError(
            f"{root} holds no exported model ({MANIFEST} is missing); fix: rekd-export CHECKPOINT --output {root}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RepositoryError(f"{path} is damaged ({error!r}); fix: copy it again or rekd-export") from None
    if not ours or version != FORMAT_VERSION:
        raise RepositoryError(
            f"{path} has format version {version}; this rekd reads {FORMAT_VERSION}; fix: rekd-export again"
        )
    return manifest


def graph_path(root: Path, manifest: Mapping[str, Any], role: str) -> Path:
    """The graph of a role ('selector', 'predictor', 'single') in the version that serves requests."""
    return Path(root) / GRAPH_MODELS[role] / str(Versions.of(manifest).current) / config.GRAPH


def plan_path(root: Path, manifest: Mapping[str, Any], role: str) -> Path:
    """The engine beside that graph."""
    return graph_path(root, manifest, role).with_name(PLAN)


def read_description(root: Path) -> ServedDescription:
    """Labels and preprocessing of the model in a repository; RepositoryError: missing or unreadable."""
    ensemble = config.read_config(Path(root) / config.ENSEMBLE / CONFIG_FILE)
    return ServedDescription.from_parameters(config.parameters_of(ensemble))


def models_of(files: Iterable[str]) -> tuple[str, ...]:
    """The models of a repository with these files: those that are always there, and those that were chosen."""
    configured = {name.partition("/")[0] for name in files if name.endswith(f"/{CONFIG_FILE}")}
    return (*config.MODELS, *sorted(configured - set(config.MODELS)))


def served_sessions(root: Path) -> dict[str, Any]:
    """How its server opens ONNX Runtime's sessions: ``target`` and ``threads`` of ``OnnxRuntimeRunner``."""
    selector = config.read_config(root / SELECTOR / CONFIG_FILE)
    return {"target": selector.backend, "threads": int(config.parameters_of(selector).get(config.THREADS, 0)) or None}


def served_device(root: Path) -> str:
    """Where Triton runs the graphs: 'cpu' or 'cuda'; 'cpu' where they are run by none, beside engines."""
    selector = config.read_config(root / SELECTOR / CONFIG_FILE)
    by_engines = selector.backend == "tensorrt" or config.ENGINE in selector.parameters
    on_gpu = any(group.kind == group.KIND_GPU for group in selector.instance_group)
    return "cuda" if on_gpu and not by_engines else "cpu"


def refuse_foreign_folder(root: Path) -> None:
    """Raise RepositoryError where writing a repository at ``root`` would destroy something else."""
    if root.exists() and not root.is_dir():
        raise RepositoryError(f"{root} is a file; fix: choose a folder")
    foreign = sorted(entry.name for entry in root.iterdir() if entry.name not in _OURS) if root.exists() else []
    if foreign:
        raise RepositoryError(
            f"{root} holds {', '.join(foreign[:5])}, which is no part of a model repository and would be lost; "
            "fix: choose an empty or new folder"
        )


@dataclass(frozen=True)
class Exported:
    """An export that can be run: a repository's newest version, or artefacts that are in none yet."""

    name: str
    """In messages."""
    description: ServedDescription
    signature: PairSignature
    entries: Mapping[str, Mapping[str, Any]]
    """What the manifest says about each graph, by role."""
    graphs: Mapping[str, Path]
    plans: Mapping[str, Path]
    """Engine files by role; those that are there."""
    batches: tuple[int, ...]
    """Sizes that batches are filled up to on a GPU."""

    @classmethod
    def of(cls, source: str | Path | Artefacts) -> Exported:
        """Check the files; RepositoryError, EngineError: one is missing, altered, or does not belong to the others."""
        if isinstance(source, Artefacts):
            entries = source.manifest["artefacts"]
            verify_files(source.manifest, source.graphs)
            for role, plan in source.engines.items():
                check_engine_file(plan, entries[role]["engine"], source.graphs[role])
            batches, described = config.ServingSettings.preferred_batch_sizes, source.description
            return cls("the export", described, source.signature, entries, source.graphs, source.engines, batches)
        root = Path(source)
        manifest = check_repository(root)
        entries = manifest["artefacts"]
        return cls(
            str(root), read_description(root), signature_from_dict(manifest.get("signature", {})), entries,
            {role: graph_path(root, manifest, role) for role in entries},
            {role: plan_path(root, manifest, role) for role, entry in entries.items() if "engine" in entry},
            tuple(manifest["repository"]["batches"]),
        )

    def graph_runner(self, role: str, *, threads: int | None = None) -> Runner:
        """The graph of a role ('selector', 'predictor', 'single'), on ONNX Runtime."""
        return OnnxRuntimeRunner(self.graphs[role], self.signature.graph(role), GRAPH_MODELS[role], threads=threads)

    def device_chain(self, roles: Sequence[str], *, index: int = 0) -> DeviceChain:
        """The graphs of some roles in order, on GPU ``index``; what predictions are made of is read."""
        graphs = [Graph(self.graphs[role], self.signature.graph(role), GRAPH_MODELS[role]) for role in roles]
        read = [spec.name for spec in self.signature.ensemble.outputs if spec.name != "logits"]
        return DeviceChain(graphs, device=f"cuda:{index}", batches={1, *self.batches}, outputs=read)

    def engine_runner(self, role: str, *, device: int = 0) -> Runner:
        """The engine of a role, on a GPU; RepositoryError: there is none."""
        entry, path = self._engine(role), self.plans[role]
        name = f"{GRAPH_MODELS[role]}/{path.name}"
        return TensorRTRunner(path, self.signature.graph(role), name, engine=entry["format"], device=device)

    def largest_batch(self, role: str) -> int:
        """The largest batch that the engine of a role accepts; raises as ``engine_runner``."""
        return largest_batch(self._engine(role))

    def _engine(self, role: str) -> Mapping[str, Any]:
        entry = self.entries.get(role, {}).get("engine")
        if entry is None:
            raise RepositoryError(
                f"{self.name} holds no engine of the {role}; fix: rekd-export CHECKPOINT with --engine tensorrt-rtx or "
                "--target tensorrt"
            )
        if not is_built(entry):
            raise RepositoryError(f"{self.name}: the engine of the {role} is not built yet; fix: rekd-export --verify")
        return entry
