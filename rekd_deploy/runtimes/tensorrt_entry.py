"""What a manifest says of an engine, and whether that is so on the machine that is to serve it. torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.tensorrt import Product, TensorRTRunner, load_library
from rekd_train.files import sha256

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Smallest, tuned and largest shape by input."""


def deferred_entry(product: Product, graph: Path, profiles: Sequence[Profile], precision: str) -> dict[str, Any]:
    """The manifest entry of an engine that is to be built elsewhere; as ``build_engine``'s, without the file."""
    return {
        "format": product.name, "version": None, "built_for": [], "precision": precision, "graph_sha256": sha256(graph),
        "profiles": [
            {name: [list(shape) for shape in shapes] for name, shapes in accepted.items()} for accepted in profiles
        ],
        "status": "unverified", "bytes": 0, "sha256": None,
    }


def is_built(entry: Mapping[str, Any]) -> bool:
    """Whether the engine of a manifest entry is there; a deferred one is built elsewhere."""
    return entry.get("sha256") is not None


def check_engine_file(path: Path, entry: Mapping[str, Any], graph: Path | None = None) -> None:
    """Compare an engine file, and the ONNX graph beside it, with its manifest entry, without a GPU or library.

    Raises:
        EngineError: it is missing or altered, or was built from another graph.
    """
    if not path.is_file():
        raise EngineError(f"{path} is missing; fix: rekd-export again")
    if (digest := sha256(path)) != entry["sha256"]:
        raise EngineError(
            f"{path} was altered: its SHA-256 begins with {digest[:12]}, the manifest says {entry['sha256'][:12]}; "
            "fix: rekd-export again"
        )
    if graph is not None and sha256(graph) != entry["graph_sha256"]:
        raise EngineError(f"{path} is stale: it was not built from the {graph.name} beside it; fix: rekd-export again")


def verify_engine(
    path: Path, manifest_entry: Mapping[str, Any], signature: GraphSignature, *, graph: Path | None = None,
    gpu: int = 0,
) -> dict[str, Any]:
    """Load an engine on the machine that is to serve it and compare it with its entry.

    Returns:
        The entry, completed: ``gpu``, and ``status`` 'verified'.

    Raises:
        EngineError: the file is altered or stale, cannot be loaded on GPU ``gpu``, or is not what the entry says.
        MissingExtraError: the library is not installed.
    """
    check_engine_file(path, manifest_entry, graph)
    library = load_library(manifest_entry["format"])
    if library.version != manifest_entry["version"]:
        raise EngineError(
            f"{path} was built with {library.product.title} {manifest_entry['version']}, {library.version} is "
            "installed; fix: export with the version that serves it"
        )
    with TensorRTRunner(path, signature, path.name, engine=library.product.name, device=gpu) as runner:
        found, gpu_name = runner.execution.profiles, runner.execution.gpu
    wanted = [
        {name: [tuple(shape) for shape in shapes] for name, shapes in accepted.items()}
        for accepted in manifest_entry["profiles"]
    ]
    if found != wanted:
        raise EngineError(f"{path} has the profiles {found}, the manifest says {wanted}")
    return {**manifest_entry, "gpu": gpu_name, "status": "verified"}
