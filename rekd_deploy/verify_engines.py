"""The engines of a repository on the machine that serves them: loaded, read back, and asked. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.engine_parity import reason_not_to_run, run_engine
from rekd_deploy.engines.tensorrt_verify import check_engine_file
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_deploy.parity_report import verification_limits
from rekd_deploy.reference import Agreement, Case, complaints
from rekd_deploy.repository_check import graph_path, plan_path
from rekd_deploy.signature import PairSignature


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
    """Check every engine of a repository, by role.

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
            check_engine_file(plan, entry, graph)
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
