"""What a manifest says of an engine, and whether that is so: file, shapes, the types it computes in. torch-free.

TensorRT 11 has no precision flags: an engine computes in the types of the graph. A graph that was never converted
builds without a word into an engine of the wrong precision, so the engine's own report is read where it can be loaded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.tensorrt import Product, TensorRTRunner, load_library
from rekd_train.files import sha256

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Smallest, tuned and largest shape by input."""

UNVERIFIED, VERIFIED, UNKNOWN = "unverified", "verified", "precision unknown"
"""An engine's status."""
NOT_AVAILABLE = "not available"
"""What stands for an engine's precision until it has been loaded on a GPU."""

_IN_REPORT = {
    "fp16": r"half|fp16", "bf16": r"bf16|bfloat16", "fp32": r"float|fp32|float32", "int8": r"int8", "fp8": r"fp8",
    "fp4": r"fp4", "int4": r"int4", "int32": r"int32", "int64": r"int64", "bool": r"bool", "uint8": r"uint8",
}
"""Words of the inspector: "Half", "Row major linear FP16 format", ..."""
_TYPE_KEYS = ("Datatype", "DataType", "Format/Datatype")
"""Where the inspector tells a tensor's type: TensorRT 11 and RTX, their lists of inputs and outputs, TensorRT 10."""
_FUSED = "ForeignNode"
"""In the name of a layer that is a compiled part of the graph: its inputs and outputs say nothing of its inside."""
_COMPUTED = {"fp32", "fp16", "bf16", "int8", "fp8", "fp4", "int4"}
"""Types that numbers are computed in; the others count, choose and mask."""


def deferred_entry(product: Product, graph: Path, profiles: Sequence[Profile], precision: str) -> dict[str, Any]:
    """The manifest entry of an engine that is to be built elsewhere; as ``build_engine``'s, without the file."""
    return {
        "format": product.name, "version": None, "built_for": [], "precision": precision, "observed": NOT_AVAILABLE,
        "graph_sha256": sha256(graph),
        "profiles": [
            {name: [list(shape) for shape in shapes] for name, shapes in accepted.items()} for accepted in profiles
        ],
        "status": UNVERIFIED, "bytes": 0, "sha256": None,
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
        The entry, completed: ``observed``, ``engine_types``, ``gpu`` and ``status`` 'verified'. Where the library
        does not tell enough of the types, ``observed`` stays 'not available' and ``status`` is 'precision unknown'.

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
        execution = runner.execution
        wanted = [
            {name: [tuple(shape) for shape in shapes] for name, shapes in accepted.items()}
            for accepted in manifest_entry["profiles"]
        ]
        if execution.profiles != wanted:
            raise EngineError(f"{path} has the profiles {execution.profiles}, the manifest says {wanted}")
        types, name = report_types(execution.report()), execution.gpu
    observed = observed_precision(types, manifest_entry["precision"], path.name)
    status = UNKNOWN if observed == NOT_AVAILABLE else VERIFIED
    return {**manifest_entry, "observed": observed, "engine_types": types, "gpu": name, "status": status}


def report_types(report: str) -> dict[str, int]:
    """How many inputs and outputs of layers have each type, by an engine inspector's report in JSON.

    Returns:
        Counts by type, 'unknown' for words that are not understood and for the inside of each compiled part; empty
        where the report does not tell (an engine built without details).

    Raises:
        EngineError: the report is not JSON.
    """
    try:
        layers = json.loads(report).get("Layers", [])
    except (json.JSONDecodeError, AttributeError) as error:
        raise EngineError(f"the engine's report cannot be read: {error}") from None
    words = Counter(_word(text) for layer in layers if isinstance(layer, dict) for text in _formats(layer))
    return dict(sorted(words.items()))


def _formats(layer: Mapping[str, Any]) -> Iterator[str]:
    if _FUSED in str(layer.get("Name")):
        yield "not told"
    for tensor in [*layer.get("Inputs", []), *layer.get("Outputs", [])]:
        yield from [str(tensor[key]) for key in _TYPE_KEYS if isinstance(tensor, dict) and key in tensor][:1]


def _word(text: str) -> str:
    words = {name: rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])" for name, words in _IN_REPORT.items()}
    found = [name for name, word in words.items() if re.search(word, text, re.IGNORECASE)]
    return found[0] if len(found) == 1 else "unknown"


def observed_precision(types: Mapping[str, int], precision: str, name: str) -> str:
    """The precision that an engine of these types computes in.

    Returns:
        ``precision``, or 'not available' where the report does not show it: no type that numbers are computed in is
        known, or some are unknown and the fp32 that an engine of any precision takes and gives does not decide.

    Raises:
        EngineError: it is not the requested precision.
    """
    computed = _COMPUTED & set(types)
    # fp32 means nothing else; any other means some of it, and beside it fp32 (int8 also half precision)
    allowed = {precision, "fp32"} | ({"fp16", "bf16"} if precision == "int8" else set())
    decides = precision != "fp32" and precision in computed
    if not computed or ("unknown" in types and not decides and not computed - allowed):
        return NOT_AVAILABLE
    if precision not in computed or computed - allowed:
        found = ", ".join(f"{count} of {kind}" for kind, count in types.items() if kind in computed)
        raise EngineError(
            f"the engine of {name} was to compute in {precision}; its tensors: {found}; fix: export again with "
            f"--precision {precision}"
        )
    return precision
