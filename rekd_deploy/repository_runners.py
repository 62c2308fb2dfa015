"""What a repository holds, run in this process: its graphs on ONNX Runtime, or its engines on a GPU. torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rekd_deploy.engines.base import Runner
from rekd_deploy.engines.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.engines.onnxruntime_device import DeviceChain, Graph
from rekd_deploy.engines.tensorrt import TensorRTRunner
from rekd_deploy.engines.tensorrt_build import is_built
from rekd_deploy.errors import RepositoryError
from rekd_deploy.manifest import signature_from_dict
from rekd_deploy.repository_check import GRAPH_MODELS, graph_path, plan_path


def graph_runner(root: Path, manifest: Mapping[str, Any], role: str, *, threads: int | None = None) -> Runner:
    """The graph of a role ('selector', 'predictor', 'single'), on ONNX Runtime."""
    signature = signature_from_dict(manifest.get("signature", {})).graph(role)
    return OnnxRuntimeRunner(graph_path(root, manifest, role), signature, GRAPH_MODELS[role], threads=threads)


def device_chain(root: Path, manifest: Mapping[str, Any], roles: Sequence[str], *, index: int = 0) -> DeviceChain:
    """The graphs of some roles in order, on GPU ``index``; batches are filled up to the sizes of the export."""
    signature = signature_from_dict(manifest.get("signature", {}))
    graphs = [Graph(graph_path(root, manifest, role), signature.graph(role), GRAPH_MODELS[role]) for role in roles]
    return DeviceChain(graphs, device=f"cuda:{index}", batches={1, *manifest["repository"]["batches"]})


def engine_runner(root: Path, manifest: Mapping[str, Any], role: str, *, device: int = 0) -> Runner:
    """The engine of a role, on a GPU.

    Raises:
        RepositoryError: the repository holds none.
    """
    entry = engine_entry(root, manifest, role)
    signature = signature_from_dict(manifest["signature"]).graph(role)
    path = plan_path(root, manifest, role)
    return TensorRTRunner(path, signature, f"{GRAPH_MODELS[role]}/{path.name}", engine=entry["format"], device=device)


def engine_entry(root: Path, manifest: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    """What the manifest says about the engine of a role; raises as ``engine_runner``."""
    entry = manifest["artefacts"].get(role, {}).get("engine")
    if entry is None:
        raise RepositoryError(
            f"{root} holds no engine of the {role}; fix: rekd-export CHECKPOINT with --engine tensorrt-rtx or --target "
            "tensorrt"
        )
    if not is_built(entry):
        raise RepositoryError(f"{root}: the engine of the {role} is not built yet; fix: rekd-export --verify {root}")
    return entry


def largest_batch(root: Path, manifest: Mapping[str, Any], role: str) -> int:
    """The largest batch that the engine of a role accepts; raises as ``engine_runner``."""
    profiles = engine_entry(root, manifest, role)["profiles"]
    return max(shapes[2][0] for profile in profiles for shapes in profile.values())
