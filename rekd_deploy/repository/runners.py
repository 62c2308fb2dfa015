"""What an export holds, run in this process: its graphs on ONNX Runtime, or its engines on a GPU. torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.contract.signature import PairSignature
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import ServingSettings
from rekd_deploy.repository.manifest import signature_from_dict, verify_files
from rekd_deploy.repository.reader import GRAPH_MODELS, check_repository, graph_path, plan_path, read_description
from rekd_deploy.runtimes.base import Graph, Runner
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_deploy.runtimes.tensorrt import TensorRTRunner
from rekd_deploy.runtimes.tensorrt_entry import check_engine_file, is_built


@dataclass(frozen=True)
class Exported:
    """An export that can be run: a repository's newest version, or artefacts that are in none yet."""

    name: str
    """How messages call it."""
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
        """Check what there is against its manifest.

        Raises:
            RepositoryError, EngineError: a file is missing, altered, or does not belong to the others.
        """
        return _from_artefacts(source) if isinstance(source, Artefacts) else _from_repository(Path(source))

    def graph_runner(self, role: str, *, threads: int | None = None) -> Runner:
        """The graph of a role ('selector', 'predictor', 'single'), on ONNX Runtime."""
        return OnnxRuntimeRunner(self.graphs[role], self.signature.graph(role), GRAPH_MODELS[role], threads=threads)

    def device_chain(self, roles: Sequence[str], *, index: int = 0) -> DeviceChain:
        """The graphs of some roles in order, on GPU ``index``; what predictions are made of is read."""
        graphs = [Graph(self.graphs[role], self.signature.graph(role), GRAPH_MODELS[role]) for role in roles]
        read = [spec.name for spec in self.signature.ensemble.outputs if spec.name != "logits"]
        return DeviceChain(graphs, device=f"cuda:{index}", batches={1, *self.batches}, outputs=read)

    def engine_runner(self, role: str, *, device: int = 0) -> Runner:
        """The engine of a role, on a GPU.

        Raises:
            RepositoryError: there is none.
        """
        entry, path = self._engine(role), self.plans[role]
        name = f"{GRAPH_MODELS[role]}/{path.name}"
        return TensorRTRunner(path, self.signature.graph(role), name, engine=entry["format"], device=device)

    def largest_batch(self, role: str) -> int:
        """The largest batch that the engine of a role accepts; raises as ``engine_runner``."""
        return max(shapes[2][0] for profile in self._engine(role)["profiles"] for shapes in profile.values())

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


def _from_repository(root: Path) -> Exported:
    manifest = check_repository(root)
    entries = manifest["artefacts"]
    return Exported(
        str(root), read_description(root), signature_from_dict(manifest.get("signature", {})), entries,
        {role: graph_path(root, manifest, role) for role in entries},
        {role: plan_path(root, manifest, role) for role, entry in entries.items() if "engine" in entry},
        tuple(manifest["repository"]["batches"]),
    )


def _from_artefacts(artefacts: Artefacts) -> Exported:
    entries = artefacts.manifest["artefacts"]
    verify_files(artefacts.manifest, artefacts.graphs)
    for role, plan in artefacts.engines.items():
        check_engine_file(plan, entries[role]["engine"], artefacts.graphs[role])
    return Exported(
        "the export", ServedDescription.of(artefacts.preprocessor, artefacts.labels), artefacts.signature, entries,
        artefacts.graphs, artefacts.engines, ServingSettings.preferred_batch_sizes,
    )
