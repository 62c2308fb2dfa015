"""What ``verify`` has checked about a repository, for people and for --json. torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekd_deploy.export.verify_engines import EngineCheck
from rekd_deploy.parity.reference import Agreement
from rekd_deploy.repository.versions import Versions
from rekd_deploy.runtimes.tensorrt.build import is_built


@dataclass
class Verification:
    """What was checked, and how it came out."""

    root: Path
    manifest: dict[str, Any]
    device: str = "cpu"
    """Where the graphs were to run."""
    served_on: str = "cpu"
    """Where their server runs them: 'cpu' or 'cuda'."""
    graphs: dict[str, Agreement] = field(default_factory=dict)
    """By role; empty where the repository has no stored answers."""
    without_cases: list[str] = field(default_factory=list)
    """Roles whose graph ran there on made-up inputs, for want of stored answers."""
    uncaptured: dict[str, str] = field(default_factory=dict)
    """By role, why the launches of a graph are not replayed on the GPU as one; empty where they are."""
    engines: dict[str, EngineCheck] = field(default_factory=dict)
    """By role; an engine that could not run here is unverified."""
    parity: dict[str, Any] = field(default_factory=dict)
    """Reports of the parity gate by name, where the checkpoint was given."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "repository": str(self.root),
            "verified": True,
            "version": Versions.of(self.manifest).current,
            "checkpoint_sha256": self.manifest["checkpoint_sha256"],
            "files": len(self.manifest["repository"]["files"]),
            "device": self.device if self.graphs or self.without_cases else None,
            "served_on": self.served_on,
            "uncaptured": self.uncaptured,
            "without_cases": self.without_cases,
            "graphs": {role: agreement.to_dict() for role, agreement in self.graphs.items()},
            "engines": {
                role: {
                    **check.entry,
                    **({"not_run": check.reason} if check.reason else {"answers": check.agreement.to_dict()}),
                }
                for role, check in self.engines.items()
            },
            "parity": self.parity,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"files       {len(self.manifest['repository']['files'])}, all as they were exported"]
        for role, agreement in self.graphs.items():
            figures = [f"{agreement.rows} stored rows on {self.device}"]
            if agreement.positions:
                figures.append(f"scores within {agreement.score_difference:.1e}")
                figures.append(f"{agreement.flipped_positions} of {agreement.positions} positions flipped")
            if agreement.compared_classes:
                figures.append(f"logits within {agreement.logit_difference:.1e}")
            lines.append(f"{role:<12}" + ", ".join(figures))
        for role in self.without_cases:
            lines.append(f"{role:<12}runs on {self.device}; its answers are not compared")
        for role, reason in self.uncaptured.items():
            lines.append(f"{role:<12}not captured as a CUDA graph: {reason}")
        for role, check in self.engines.items():
            state = "unverified" if is_built(check.entry) else "unverified, not built yet"
            outcome = f"{state}: {check.reason}" if check.reason else (
                f"{check.entry['status']} on {check.entry['gpu']}, {check.entry['precision']} asked for, "
                f"{check.entry['observed']} observed, {check.agreement.rows} stored rows"
            )
            lines.append(f"{role} engine {outcome}")
        if not self.graphs:
            reason = "the repository was written without stored answers"
            if self.manifest["parity"].get("emulated"):
                precision = self.manifest["artefacts"]["predictor"]["precision"]
                reason = f"ONNX Runtime cannot compute in {precision}; engines are asked where they can run"
            lines.append(f"answers     not compared: {reason}")
        if self.served_on == "cuda" and self.device == "cpu":
            lines.append("warning     the server has a GPU, which did not run here; fix: --device cuda on its machine")
        for name, figures in self.parity.items():
            lines.append(
                f"{name + ' gate':<12}{figures['examples']} examples, {figures['constructed_rows']} constructed rows "
                f"on {figures['device']}: scores within {figures['score_difference']:.1e}, "
                f"logits within {figures['logit_difference']:.1e}"
            )
        version, origin = Versions.of(self.manifest).current, self.manifest["checkpoint_sha256"][:12]
        return [*lines, f"verified    {self.root}, version {version}, checkpoint {origin}"]
