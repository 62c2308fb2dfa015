"""The engines of a repository on the machine that serves them: loaded, read back, and asked. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.engines.tensorrt import TensorRTRunner
from rekd_deploy.engines.tensorrt_execution import Cuda, ExecutionError
from rekd_deploy.engines.tensorrt_library import load_library
from rekd_deploy.engines.tensorrt_verify import check_engine_file, verify_engine
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_deploy.parity_report import verification_limits
from rekd_deploy.reference import Agreement, Case, compare, complaints
from rekd_deploy.repository_check import graph_path, plan_path
from rekd_deploy.signature import PairSignature
from rekd_train.errors import MissingExtraError


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
            if reason := _cannot_run(entry["format"]):
                checks[role] = EngineCheck(dict(entry), reason=reason)
                continue
            completed = verify_engine(plan, entry, signature.graph(role), graph=graph)
            with TensorRTRunner(plan, signature.graph(role), str(plan), engine=entry["format"]) as runner:
                agreement = compare(role, runner.run, signature.graph(role), cases, limits["tie_margin"])
        except EngineError as error:
            raise RepositoryError(str(error)) from None
        if found := complaints(agreement, limits):
            raise RepositoryError(
                f"{plan} does not answer as the exported model did: {'; '.join(found)}; fix: rekd-export again"
            )
        checks[role] = EngineCheck(completed, agreement)
    return checks


def _cannot_run(product: str) -> str:
    """Why engines of a product cannot run on this machine; empty if they can."""
    try:
        Cuda().close()
        load_library(product)
    except (ExecutionError, MissingExtraError, EngineError) as error:
        return str(error)
    return ""
