"""A repository checked against what it says it is: files, configurations, and the answers of its graphs. torch-free.

With the checkpoint at hand the whole parity gate runs once more, and needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.contract.parity_report import verification_limits
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_deploy.export.checkpoint import read_facts
from rekd_deploy.export.engines import EngineCheck, check_engines
from rekd_deploy.parity.reference import Agreement, Case, compare, complaints, read_cases
from rekd_deploy.repository.build import example, lengths_of
from rekd_deploy.repository.config import CONFIG_FILE, REFERENCE
from rekd_deploy.repository.manifest import Versions, signature_from_dict, verify_files
from rekd_deploy.repository.reader import (
    GRAPH_MODELS,
    MANIFEST,
    check_repository,
    graph_path,
    plan_path,
    read_description,
    served_device,
    served_sessions,
)
from rekd_deploy.runtimes.base import Arrays, Graph, parse_device
from rekd_deploy.runtimes.onnxruntime_cuda import check_device
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain, chain_on
from rekd_deploy.runtimes.tensorrt import is_built
from rekd_train.files import write_json
from rekd_train.inputs.preprocessors import Preprocessor


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
        own = ("served_on", "uncaptured", "without_cases", "parity")
        return {
            "repository": str(self.root), "verified": True, "version": Versions.of(self.manifest).current,
            "checkpoint_sha256": self.manifest["checkpoint_sha256"],
            "files": len(self.manifest["repository"]["files"]),
            "device": self.device if self.graphs or self.without_cases else None,
            "graphs": {role: agreement.to_dict() for role, agreement in self.graphs.items()},
            "engines": {role: check.to_dict() for role, check in self.engines.items()},
            **{name: getattr(self, name) for name in own},
        }


def verify(
    root: str | Path, *, checkpoint: str | Path | None = None, device: str = "cpu",
    report: Callable[[str], None] = lambda step: None,
) -> Verification:
    """Check an exported repository again, where it lies and with what is installed there.

    Args:
        checkpoint: what it should have been exported from; None: the stored answers alone.
        device: where the graphs answer, in the gate against a checkpoint, too: 'cpu', 'cuda' or 'cuda:N'.
        report: called with the name of each step as it starts.

    Raises:
        RepositoryError, CheckpointError: names the file and what is wrong with it.
        EngineError, MissingExtraError: there is no such device.
    """
    root = Path(root)
    check_device(device)
    report("files")
    manifest = check_repository(root)
    signature = signature_from_dict(manifest["signature"])
    paths = {role: graph_path(root, manifest, role) for role in manifest["artefacts"] if role in GRAPH_MODELS}
    verify_files(manifest, paths)
    description = read_description(root)
    preprocessor = description.preprocessor()
    if description.fingerprint != manifest["preprocessing_sha256"] or list(description.labels) != manifest["labels"]:
        what = "describes other labels or another preprocessing than the manifest"
        raise RepositoryError(f"{root / 'rekd' / CONFIG_FILE} {what}; fix: rekd-export again")
    found = Verification(root, manifest, device, served_device(root))
    sessions = {"device": device, **served_sessions(root)}
    cases = read_cases(root / REFERENCE) if REFERENCE in manifest["repository"]["files"] else []
    if not manifest["parity"].get("emulated"):  # ONNX Runtime cannot run what had to be emulated for it
        for role, path in paths.items():
            report(role)
            graph = Graph(path, signature.graph(role), GRAPH_MODELS[role])
            with _running(role, graph, found.uncaptured, sessions) as run:
                if cases:
                    found.graphs[role] = _answers(role, graph, run, cases, manifest)
                else:
                    _answers_something(graph, run, preprocessor)
                    found.without_cases.append(role)
    found.engines = check_engines(root, manifest, signature, cases, report, parse_device(device)[1])
    _complete(root, manifest, found.engines)
    if checkpoint is not None:
        report("parity")
        read_facts(checkpoint)  # its complaints come before torch is loaded
        from rekd_deploy.export.graphs import prove_again

        found.parity = prove_again(root, manifest, paths, Path(checkpoint), sessions)
    return found


def _complete(root: Path, manifest: dict[str, Any], engines: dict[str, EngineCheck]) -> None:
    """Write what was found out about the engines into the manifest; a repository that cannot be written stays."""
    new = {role: check.entry for role, check in engines.items() if manifest["artefacts"][role]["engine"] != check.entry}
    for role, entry in new.items():
        manifest["artefacts"][role]["engine"] = entry
        if is_built(entry):
            name = plan_path(root, manifest, role).relative_to(root).as_posix()
            manifest["repository"]["files"][name] = entry["sha256"]
    if new:
        with suppress(OSError):
            write_json(root / MANIFEST, manifest)


@contextmanager
def _running(
    role: str, graph: Graph, uncaptured: dict[str, str], sessions: dict[str, Any]
) -> Iterator[Callable[[Arrays], Arrays]]:
    """What runs a graph; ``uncaptured`` is told by role why its launches are not replayed, where they are not."""
    unopened = chain_on([graph], **sessions)
    try:
        with unopened as chain:
            yield chain.run
            if isinstance(chain, DeviceChain) and chain.uncaptured:
                uncaptured[role] = "; ".join(chain.uncaptured.values())
    except EngineError as error:
        raise RepositoryError(f"{graph.model} cannot be run: {error}") from None


def _answers_something(graph: Graph, run: Callable[[Arrays], Arrays], preprocessor: Preprocessor) -> None:
    """Run a row of each padded length, as there are no stored ones; raise RepositoryError for what is no number."""
    for length in lengths_of(graph.signature, preprocessor):
        row = example(graph.signature, preprocessor, length)
        outputs = run({name: array[None] for name, array in row.items()})
        if wrong := [name for name, array in outputs.items() if not np.isfinite(array).all()]:
            raise RepositoryError(f"{graph.model} gives {', '.join(wrong)} that are no numbers; fix: rekd-export again")


def _answers(
    role: str, graph: Graph, run: Callable[[Arrays], Arrays], cases: list[Case], manifest: dict[str, Any]
) -> Agreement:
    """How the graph answers the stored cases; raise RepositoryError where that is not as the model did."""
    limits = verification_limits(manifest["parity"])
    agreement = compare(role, run, graph.signature, cases, limits["tie_margin"])
    if found := complaints(agreement, limits):
        raise RepositoryError(
            f"{graph.model} does not answer as the exported model did on the inputs in {REFERENCE}: "
            f"{'; '.join(found)}; it belongs to another checkpoint, or this machine computes wrongly; fix: rekd-export "
            "again"
        )
    return agreement
