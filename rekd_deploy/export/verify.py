"""A repository held against what it says it is: files, configurations, and the answers of its graphs. torch-free.

With the checkpoint at hand the whole parity gate runs once more, and needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekd_deploy.contract.parity_report import ParityLimits, verification_limits
from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import EngineError, ParityError, RepositoryError
from rekd_deploy.export.verify_engines import EngineCheck, check_engines
from rekd_deploy.parity.reference import Agreement, Case, compare, complaints, read_cases
from rekd_deploy.repository.config import CONFIG_FILE, read_config
from rekd_deploy.repository.config_rules import graph_mistakes
from rekd_deploy.repository.manifest import signature_from_dict, verify_files
from rekd_deploy.repository.reader import (
    GRAPH_MODELS,
    MANIFEST,
    REFERENCE,
    check_repository,
    graph_path,
    plan_path,
    read_description,
    read_manifest,
    served_sessions,
)
from rekd_deploy.repository.runners import runner_on
from rekd_deploy.repository.versions import Versions
from rekd_deploy.runtimes.tensorrt.build import is_built
from rekd_train.files import write_json


@dataclass
class Verification:
    """What was checked, and how it came out."""

    root: Path
    manifest: dict[str, Any]
    device: str = "cpu"
    """Where the graphs ran."""
    graphs: dict[str, Agreement] = field(default_factory=dict)
    """By role; empty where the repository has no stored answers."""
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
            "device": self.device,
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
        for name, figures in self.parity.items():
            lines.append(
                f"{name + ' gate':<12}{figures['examples']} examples, {figures['constructed_rows']} constructed rows: "
                f"scores within {figures['score_difference']:.1e}, logits within {figures['logit_difference']:.1e}"
            )
        version, origin = Versions.of(self.manifest).current, self.manifest["checkpoint_sha256"][:12]
        return [*lines, f"verified    {self.root}, version {version}, checkpoint {origin}"]


def verify(
    root: str | Path, *, checkpoint: str | Path | None = None, device: str = "cpu",
    report: Callable[[str], None] = lambda step: None,
) -> Verification:
    """Check an exported repository again, where it lies and with what is installed there.

    Args:
        checkpoint: what it should have been exported from; None: the stored answers alone.
        device: where the graphs answer: 'cpu', 'cuda' or 'cuda:N'; the gate against a checkpoint runs on the CPU.
        report: called with the name of each step as it starts.

    Raises:
        RepositoryError: names the file and what is wrong with it.
        CheckpointError: the checkpoint cannot be read.
        EngineError, MissingExtraError: there is no such device.
    """
    root = Path(root)
    report("files")
    try:
        manifest = check_repository(root)
    except RepositoryError as error:
        raise RepositoryError(f"{error}{_diagnosis(root)}") from None
    signature = signature_from_dict(manifest["signature"])
    paths = {role: graph_path(root, manifest, role) for role in manifest["artefacts"] if role in GRAPH_MODELS}
    verify_files(manifest, paths)
    mistakes = [
        mistake
        for role, path in paths.items()
        for mistake in graph_mistakes(read_config(root / GRAPH_MODELS[role] / CONFIG_FILE), path)
    ]
    if mistakes:
        raise RepositoryError(f"{root} would not load: " + "; ".join(mistakes))
    _check_preprocessing(root, manifest)
    verification = Verification(root, manifest, device)
    sessions = served_sessions(root)
    cases = read_cases(root / REFERENCE) if REFERENCE in manifest["repository"]["files"] else []
    if cases and not manifest["parity"].get("emulated"):  # ONNX Runtime cannot run what had to be emulated for it
        for role, path in paths.items():
            report(role)
            verification.graphs[role] = _answers(
                role, path, signature.graph(role), cases, manifest, device, **sessions
            )
    verification.engines = check_engines(root, manifest, signature, cases, report)
    _complete(root, verification)
    if checkpoint is not None:
        report("parity")
        verification.parity = _gate_again(root, manifest, paths, Path(checkpoint), sessions)
    return verification


def _complete(root: Path, verification: Verification) -> None:
    """Write what was found out about the engines into the manifest; a repository that cannot be written stays."""
    manifest, found = verification.manifest, False
    for role, check in verification.engines.items():
        found = found or manifest["artefacts"][role]["engine"] != check.entry
        manifest["artefacts"][role]["engine"] = check.entry
        if is_built(check.entry):
            name = plan_path(root, manifest, role).relative_to(root).as_posix()
            manifest["repository"]["files"][name] = check.entry["sha256"]
    if found:
        with suppress(OSError):
            write_json(root / MANIFEST, manifest)


def _check_preprocessing(root: Path, manifest: dict[str, Any]) -> None:
    description = read_description(root)
    description.preprocessor()
    if description.fingerprint != manifest["preprocessing_sha256"] or list(description.labels) != manifest["labels"]:
        raise RepositoryError(
            f"{root / 'rekd' / CONFIG_FILE} describes other labels or another preprocessing than the manifest; fix: "
            "rekd-export again"
        )


def _answers(
    role: str, path: Path, signature: GraphSignature, cases: list[Case], manifest: dict[str, Any], device: str = "cpu",
    **sessions: Any,
) -> Agreement:
    """How the graph answers the stored cases.

    Raises:
        RepositoryError: the graph cannot run, or answers otherwise than the model did.
    """
    limits, unopened = verification_limits(manifest["parity"]), runner_on(device, role, path, signature, **sessions)
    try:
        with unopened as runner:
            agreement = compare(role, runner.run, signature, cases, limits["tie_margin"])
    except EngineError as error:
        raise RepositoryError(f"{path} cannot be run: {error}") from None
    if found := complaints(agreement, limits):
        raise RepositoryError(
            f"{path} does not answer as the exported model did on the inputs in {REFERENCE}: {'; '.join(found)}; it "
            "belongs to another checkpoint, or this machine computes wrongly; fix: rekd-export again"
        )
    return agreement


def _diagnosis(root: Path) -> str:
    """What a graph that is not the exported one turns out to be; empty where that cannot be said."""
    try:
        manifest = read_manifest(root)
        signature, cases = signature_from_dict(manifest["signature"]), read_cases(root / REFERENCE)
    except (RepositoryError, KeyError):
        return ""
    found = []
    for role in (role for role in manifest["artefacts"] if role in GRAPH_MODELS):
        path = graph_path(root, manifest, role)
        try:
            verify_files(manifest, {role: path})
        except RepositoryError:
            verdict = _what_it_is(role, path, signature.graph(role), cases, manifest)
            found.append(f"; {path.relative_to(root)} {verdict}")
    return "".join(found)


def _what_it_is(
    role: str, path: Path, signature: GraphSignature, cases: list[Case], manifest: dict[str, Any]
) -> str:
    if not path.is_file():
        return "is missing"
    try:
        _answers(role, path, signature, cases, manifest)
    except RepositoryError as error:
        if "cannot be run" in str(error):
            return "is no graph of this pair, or damaged: it does not load"
        return "answers otherwise than the exported model: a graph of another checkpoint, or damaged weights"
    return "still answers as the exported model, but is not the file that was written"


def _gate_again(
    root: Path, manifest: dict[str, Any], paths: dict[str, Path], checkpoint: Path, sessions: dict[str, Any]
) -> dict[str, Any]:
    """The parity gate on the repository's graphs.

    Raises:
        RepositoryError: another checkpoint, or the gate refuses.
    """
    from rekd_deploy.export.checkpoint import read_facts

    read_facts(checkpoint)  # its complaints come before torch is loaded
    from rekd_deploy.parity.examples import parity_examples, with_lengths
    from rekd_deploy.parity.gate import check_parity, check_single_parity
    from rekd_train.checkpoints.checkpoint import checkpoint_hash, load

    digest = checkpoint_hash(checkpoint)
    if digest != manifest["checkpoint_sha256"]:
        raise RepositoryError(
            f"{root} was exported from the checkpoint {manifest['checkpoint_sha256'][:12]}, but {checkpoint} is "
            f"{digest[:12]}; fix: give the right checkpoint, or export this one"
        )
    rationalizer = load(checkpoint)
    rationalizer.preprocessor = with_lengths(rationalizer.preprocessor, tuple(manifest.get("lengths", ())))
    examples = parity_examples(checkpoint, rationalizer.preprocessor, class_names=rationalizer.labels)
    limits = ParityLimits(**manifest["parity"]["limits"])
    try:
        pair = check_parity(rationalizer, paths["selector"], paths["predictor"], examples, limits, **sessions)
        reports = {"pair": pair}
        if "single" in paths:
            reports["single"] = check_single_parity(rationalizer, paths["single"], examples, limits, **sessions)
    except ParityError as error:
        raise RepositoryError(f"{root}: {error}; fix: rekd-export again") from None
    return {name: each.to_dict() for name, each in reports.items()}
