"""A repository's engines, one a graph: planned, built, deferred to where they serve, checked there. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.contract.parity_report import verification_limits
from rekd_deploy.contract.signature import SHORTEST, PairSignature
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_deploy.parity.engines import reason_not_to_run, run_engine
from rekd_deploy.parity.reference import Agreement, Case, complaints
from rekd_deploy.repository.reader import graph_path, plan_path
from rekd_deploy.runtimes import tensorrt
from rekd_deploy.runtimes.tensorrt_build import Range, batch_ranges, build_engine, length_ranges, profiles_of


@dataclass(frozen=True)
class EngineRequest:
    """Which shapes engines accept."""

    max_batch_size: int = 64
    """Most items in one batch of the server."""
    batches: tuple[int, ...] | None = None
    """Batch sizes to tune for; None: one range, tuned for 8."""
    lengths: tuple[int, ...] | None = None
    """Text lengths to tune for; None: one range, tuned for the longest text of the model."""


def build_engines(
    artefacts: Artefacts, work: Path, library: tensorrt.Library, request: EngineRequest, report: Callable[[str], None]
) -> Artefacts:
    """The same artefacts with an engine for each graph, ``work``/<role>.plan, and its manifest entry.

    Raises:
        EngineError: a graph cannot be built, or a size is out of range.
    """
    engines, entries = {}, {}
    for role, profiles in _profiles(artefacts, request).items():
        report(f"{role} engine")
        engines[role], signature = work / f"{role}.plan", artefacts.signature.graph(role)
        precision = _precision(artefacts, role)
        entries[role] = build_engine(library, artefacts.graphs[role], engines[role], signature, profiles, precision)
    return _with_engines(artefacts, entries, engines)


def defer_engines(artefacts: Artefacts, product: tensorrt.Product, request: EngineRequest) -> Artefacts:
    """The same artefacts with engines that are still to be built, on the machine that will serve them."""
    entries = {
        role: tensorrt.deferred_entry(product, artefacts.graphs[role], profiles, _precision(artefacts, role))
        for role, profiles in _profiles(artefacts, request).items()
    }
    return _with_engines(artefacts, entries, {})


def plan_engines(artefacts: Artefacts, product: tensorrt.Product, request: EngineRequest) -> Artefacts:
    """The same artefacts as if their engines were built already: enough to make configurations of; see there."""
    profiles = _profiles(artefacts, request)
    entries = {role: {"format": product.name, "profiles": profiles[role]} for role in profiles}
    return _with_engines(artefacts, entries, dict.fromkeys(profiles, Path("not built yet")))


def _with_engines(artefacts: Artefacts, entries: Mapping[str, Any], engines: dict[str, Path]) -> Artefacts:
    known = artefacts.manifest.get("artefacts", {})
    merged = {role: {**known.get(role, {}), "engine": entry} for role, entry in entries.items()}
    return replace(artefacts, engines=engines, manifest={**artefacts.manifest, "artefacts": merged})


def _precision(artefacts: Artefacts, role: str) -> str:
    """Of an engine, by the manifest entry of its graph: where a step stayed float32, its engine does, too."""
    entry = artefacts.manifest["artefacts"][role]
    return entry["observed" if "note" in entry else "precision"]


def _profiles(artefacts: Artefacts, request: EngineRequest) -> dict[str, list[tensorrt.Profile]]:
    """By role; images have no lengths."""
    settings, lengths = artefacts.preprocessor.settings, []
    if settings.kind == "text":
        longest = settings.max_length
        # Triton's backend can launch a CUDA graph for every bucket of one profile only
        lengths = [Range(SHORTEST, longest, longest)]
        if request.lengths is not None:
            lengths = length_ranges(request.lengths, longest)
    batches = batch_ranges(request.batches, request.max_batch_size)
    return {role: profiles_of(artefacts.signature.graph(role), batches, lengths) for role in artefacts.graphs}


@dataclass(frozen=True)
class EngineCheck:
    """What was found out about an engine."""

    entry: dict[str, Any]
    """Its manifest entry, completed where it could be loaded."""
    agreement: Agreement | None = None
    """Its answers against the stored ones; None: it did not run here."""
    reason: str = ""
    """Why it did not run here."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return self.entry | ({"not_run": self.reason} if self.reason else {"answers": self.agreement.to_dict()})


def check_engines(
    root: Path, manifest: Mapping[str, Any], signature: PairSignature, cases: Sequence[Case],
    report: Callable[[str], None], gpu: int = 0,
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
        entry, interface = artefact["engine"], signature.graph(role)
        plan, graph = plan_path(root, manifest, role), graph_path(root, manifest, role)
        reason = reason_not_to_run(entry, gpu)
        try:
            if tensorrt.is_built(entry):
                tensorrt.check_engine_file(plan, entry, graph)
            elif not reason:
                report(f"{role} engine (building it)")
                library = tensorrt.load_library(entry["format"])
                entry = build_engine(library, graph, plan, interface, tensorrt.profiles_in(entry), entry["precision"])
            if reason:
                checks[role] = EngineCheck(dict(entry), reason=reason)
                continue
            completed, agreement = run_engine(
                role, plan, entry, interface, cases, limits["tie_margin"], graph=graph, gpu=gpu
            )
        except EngineError as error:
            raise RepositoryError(str(error)) from None
        except OSError as error:
            fix = "verify where the repository may be written to"
            raise RepositoryError(f"{plan} cannot be written: {error.strerror}; fix: {fix}") from None
        if found := complaints(agreement, limits):
            raise RepositoryError(
                f"{plan} does not answer as the exported model did: {'; '.join(found)}; fix: rekd-export again"
            )
        checks[role] = EngineCheck(completed, agreement)
    return checks
