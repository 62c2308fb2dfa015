"""The engines of a repository, one a graph: planned, built, deferred to the machine that serves them, checked there.

torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.contract.parity_report import verification_limits
from rekd_deploy.contract.signature import SHORTEST, GraphSignature, PairSignature
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_deploy.parity.engines import reason_not_to_run, run_engine
from rekd_deploy.parity.reference import Agreement, Case, complaints
from rekd_deploy.repository.reader import graph_path, plan_path
from rekd_deploy.runtimes.tensorrt.build import (
    BuildSettings,
    Profile,
    Range,
    batch_ranges,
    build_engine,
    deferred_entry,
    is_built,
    length_ranges,
    profiles_of,
)
from rekd_deploy.runtimes.tensorrt.library import Library, Product, load_library
from rekd_deploy.runtimes.tensorrt.runner import check_engine_file


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


def defer_engines(artefacts: Artefacts, product: Product, request: EngineRequest) -> Artefacts:
    """The same artefacts with engines that are still to be built, on the machine that will serve them.

    The manifest says all that is known of them: the graph, its types, the shapes, ``status`` 'unverified'.
    """
    entries = dict(artefacts.manifest["artefacts"])
    for role, profiles in _profiles(artefacts, request).items():
        deferred = deferred_entry(product, artefacts.graphs[role], profiles, _precision(entries[role]))
        entries[role] = {**entries[role], "engine": deferred}
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


@dataclass(frozen=True)
class EngineCheck:
    """What was found out about an engine."""

    entry: dict[str, Any]
    """Its manifest entry, completed where it could be loaded."""
    agreement: Agreement | None = None
    """Its answers against the stored ones; None: it did not run here."""
    reason: str = ""
    """Why it did not run here."""


def check_engines(
    root: Path,
    manifest: Mapping[str, Any],
    signature: PairSignature,
    cases: Sequence[Case],
    report: Callable[[str], None],
    gpu: int = 0,
) -> dict[str, EngineCheck]:
    """Check every engine of a repository on a GPU, by role; one that was deferred is built here, if it can be.

    Raises:
        RepositoryError: an engine is altered, stale, not what its entry says, or answers otherwise than the model.
    """
    limits = verification_limits(manifest["parity"])
    checks = {}
    for role, artefact in manifest["artefacts"].items():
        if "engine" not in artefact:
            continue
        report(f"{role} engine")
        entry, plan = artefact["engine"], plan_path(root, manifest, role)
        graph = graph_path(root, manifest, role)
        try:
            if is_built(entry):
                check_engine_file(plan, entry, graph)
            elif not reason_not_to_run(entry, gpu):
                report(f"{role} engine (building it)")
                entry = _built(plan, entry, graph, signature.graph(role))
            if reason := reason_not_to_run(entry, gpu):
                checks[role] = EngineCheck(dict(entry), reason=reason)
                continue
            completed, agreement = run_engine(
                role, plan, entry, signature.graph(role), cases, limits["tie_margin"], graph=graph, gpu=gpu
            )
        except EngineError as error:
            raise RepositoryError(str(error)) from None
        if found := complaints(agreement, limits):
            raise RepositoryError(
                f"{plan} does not answer as the exported model did: {'; '.join(found)}; fix: rekd-export again"
            )
        checks[role] = EngineCheck(completed, agreement)
    return checks


def _built(plan: Path, deferred: Mapping[str, Any], graph: Path, signature: GraphSignature) -> dict[str, Any]:
    """Build a deferred engine where it belongs; its entry.

    Raises:
        EngineError: it cannot be built, or not be written.
    """
    profiles = [
        {name: tuple(map(tuple, shapes)) for name, shapes in accepted.items()} for accepted in deferred["profiles"]
    ]
    settings = BuildSettings(deferred["precision"])
    try:
        return build_engine(load_library(deferred["format"]), graph, plan, signature, profiles, settings)
    except OSError as error:
        raise EngineError(
            f"{plan} cannot be written: {error.strerror}; fix: verify where the repository may be written to"
        ) from None
