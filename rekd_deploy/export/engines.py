"""Verified graphs -> the engines of a repository, one a graph. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.contract.signature import SHORTEST
from rekd_deploy.runtimes.tensorrt.build import (
    BuildSettings,
    Profile,
    Range,
    batch_ranges,
    build_engine,
    deferred_entry,
    length_ranges,
    profiles_of,
)
from rekd_deploy.runtimes.tensorrt.library import Library, Product


@dataclass(frozen=True)
class EngineRequest:
    """Which shapes engines accept and how they are built."""

    max_batch_size: int = 64
    """Most items in one batch of the server."""
    batches: tuple[int, ...] | None = None
    """Batch sizes to tune for; None: one range, tuned for 8."""
    lengths: tuple[int, ...] | None = None
    """Text lengths to tune for; None: one range, tuned for the longest text of the model."""
    capabilities: tuple[str, ...] | None = None
    """See ``BuildSettings``, as the rest."""
    workspace: int | None = None
    optimisation_level: int | None = None
    timing_cache: Path | None = None
    """None: one beside the engines, shared by those of this export."""


def build_engines(
    artefacts: Artefacts,
    work: Path,
    library: Library,
    request: EngineRequest | None = None,
    report: Callable[[str], None] = lambda role: None,
) -> Artefacts:
    """The same artefacts with an engine for each graph.

    Args:
        artefacts: unfused graphs, in the precision that the engines are to have.
        work: directory that receives <role>.plan.
        library: of the product that builds, see ``load_library``.
        report: called with the name of each engine as its build starts.

    Returns:
        ``engines`` holds the files, ``manifest["artefacts"][role]["engine"]`` what they are.

    Raises:
        EngineError: a graph cannot be built, or a size is out of range.
    """
    request = request or EngineRequest()
    work = Path(work)
    profiles = _profiles(artefacts, request)
    engines, entries = {}, dict(artefacts.manifest["artefacts"])
    for role, graph in artefacts.graphs.items():
        report(f"{role} engine")
        settings = BuildSettings(
            _precision(entries[role]), request.capabilities, request.workspace, request.optimisation_level,
            request.timing_cache or work / "timing.cache",
        )
        engines[role] = work / f"{role}.plan"
        entry = build_engine(
            library, graph, engines[role], artefacts.signature.graph(role), profiles[role], settings
        )
        entries[role] = {**entries[role], "engine": entry}
    return replace(artefacts, engines=engines, manifest={**artefacts.manifest, "artefacts": entries})


def promise_engines(artefacts: Artefacts, product: Product, request: EngineRequest) -> Artefacts:
    """The same artefacts with engines that are still to be built, on the machine that will serve them.

    The manifest says all that is known of them: the graph, its types, the shapes, ``status`` 'unverified'.
    """
    entries = dict(artefacts.manifest["artefacts"])
    for role, profiles in _profiles(artefacts, request).items():
        promise = deferred_entry(product, artefacts.graphs[role], profiles, _precision(entries[role]))
        entries[role] = {**entries[role], "engine": promise}
    return replace(artefacts, manifest={**artefacts.manifest, "artefacts": entries})


def _precision(entry: Mapping[str, Any]) -> str:
    """Of an engine, by the manifest entry of its graph: where a step stayed float32, its engine does, too."""
    return entry["observed" if "note" in entry else "precision"]


def plan_engines(artefacts: Artefacts, product: Product, request: EngineRequest) -> Artefacts:
    """The same artefacts as if their engines were built already: enough to make configurations of; see there."""
    entries = {
        role: {"engine": {"format": product.name, "profiles": profiles}}
        for role, profiles in _profiles(artefacts, request).items()
    }
    nothing = Path("not built yet")
    manifest = {**artefacts.manifest, "artefacts": entries}
    return replace(artefacts, engines=dict.fromkeys(entries, nothing), manifest=manifest)


def _profiles(artefacts: Artefacts, request: EngineRequest) -> dict[str, list[Profile]]:
    """By role."""
    batches, lengths = _ranges(artefacts, request)
    return {role: profiles_of(artefacts.signature.graph(role), batches, lengths) for role in artefacts.graphs}


def _ranges(artefacts: Artefacts, request: EngineRequest) -> tuple[list[Range], list[Range]]:
    """Of batches and lengths; images have no lengths."""
    batches = batch_ranges(request.batches, request.max_batch_size)
    settings = artefacts.preprocessor.settings
    if settings.kind != "text":
        return batches, []
    longest = settings.max_length
    if request.lengths is None:  # Triton's backend can launch a CUDA graph for every bucket of one profile only
        return batches, [Range(SHORTEST, longest, longest)]
    return batches, length_ranges(request.lengths, longest)
