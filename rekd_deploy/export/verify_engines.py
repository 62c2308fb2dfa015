"""The engines of a repository on the machine that serves them: loaded, read back, and asked. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.contract.parity_report import verification_limits
from rekd_deploy.contract.signature import GraphSignature, PairSignature
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_deploy.parity.engines import reason_not_to_run, run_engine
from rekd_deploy.parity.reference import Agreement, Case, complaints
from rekd_deploy.repository.reader import graph_path, plan_path
from rekd_deploy.runtimes.tensorrt.build import BuildSettings, build_engine, is_built
from rekd_deploy.runtimes.tensorrt.library import load_library
from rekd_deploy.runtimes.tensorrt.runner import check_engine_file


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
) -> dict[str, EngineCheck]:
    """Check every engine of a repository, by role; one that is promised is built here, if this machine can.

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
            elif not reason_not_to_run(entry):
                report(f"{role} engine (building it)")
                entry = _built(plan, entry, graph, signature.graph(role))
            if reason := reason_not_to_run(entry):
                checks[role] = EngineCheck(dict(entry), reason=reason)
                continue
            completed, agreement = run_engine(
                role, plan, entry, signature.graph(role), cases, limits["tie_margin"], graph=graph
            )
        except EngineError as error:
            raise RepositoryError(str(error)) from None
        if found := complaints(agreement, limits):
            raise RepositoryError(
                f"{plan} does not answer as the exported model did: {'; '.join(found)}; fix: rekd-export again"
            )
        checks[role] = EngineCheck(completed, agreement)
    return checks


def _built(plan: Path, promise: Mapping[str, Any], graph: Path, signature: GraphSignature) -> dict[str, Any]:
    """Build a promised engine where it belongs; its entry.

    Raises:
        EngineError: it cannot be built, or not be written.
    """
    profiles = [
        {name: tuple(map(tuple, shapes)) for name, shapes in accepted.items()} for accepted in promise["profiles"]
    ]
    settings = BuildSettings(promise["precision"])
    try:
        return build_engine(load_library(promise["format"]), graph, plan, signature, profiles, settings)
    except OSError as error:
        raise EngineError(
            f"{plan} cannot be written: {error.strerror}; fix: verify where the repository may be written to"
        ) from None
