"""Checkpoint -> verified model repository, in one call."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.manifest import verify_files
from rekd_deploy.repository import GRAPH, GRAPH_MODELS, refuse_foreign_folder, write_repository
from rekd_train.errors import CheckpointError


@dataclass(frozen=True)
class Publication:
    """A repository that was written, and how it came to be."""

    root: Path
    manifest: dict[str, Any]
    seconds: dict[str, float]
    """Wall time of each step, in order."""

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "repository": str(self.root),
            "artefacts": self.manifest["artefacts"],
            "parity": self.manifest["parity"],
            "manifest": self.manifest,
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }


def publish(
    checkpoint: str | Path,
    root: str | Path,
    *,
    target: str = "python",
    max_batch_size: int = 64,
    single_graph: bool = False,
    fused: bool = True,
    parity_texts: str | Path | None = None,
    report: Callable[[str], None] = lambda step: None,
) -> Publication:
    """Export a checkpoint, prove the graphs equal to the model, and put them in a Triton repository.

    An older repository at ``root`` serves on until the new one is whole, and stays if anything fails.

    Args:
        checkpoint: directory written by rekd-train.
        root: the repository.
        target: which Triton backend runs the graphs.
        max_batch_size: most texts or images in one request.
        single_graph: add a model that holds both steps in one graph.
        fused: graphs for ONNX Runtime alone, and faster there.
        parity_texts: .jsonl or .txt with real texts for the parity gate; None: the checkpoint's own examples.
        report: called with the name of each step as it starts.

    Raises:
        CheckpointError, ExportError, ParityError, RepositoryError, InputError.
    """
    checkpoint, root = Path(checkpoint), Path(root)
    if not checkpoint.is_dir():  # both are said before torch is loaded
        raise CheckpointError(f"no checkpoint at {checkpoint}: not a directory; fix: check the path")
    refuse_foreign_folder(root)
    clock = _Clock(report)
    clock("load")
    from rekd_deploy.export import export  # loads torch

    with tempfile.TemporaryDirectory(prefix="rekd-export-") as work:
        artefacts = export(
            checkpoint, work, single_graph=single_graph, fused=fused, parity_texts=parity_texts, report=clock
        )
        clock("repository")
        write_repository(artefacts, root, target=target, max_batch_size=max_batch_size)
        graphs = {role: root / GRAPH_MODELS[role] / "1" / GRAPH for role in artefacts.graphs}
        verify_files(artefacts.manifest, graphs)
    return Publication(root, artefacts.manifest, clock.stop())


class _Clock:
    """Wall time of steps that follow each other."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._seconds: dict[str, float] = {}
        self._step: str | None = None
        self._since = 0.0

    def __call__(self, step: str) -> None:
        self.stop()
        self._step = step
        self._report(step)

    def stop(self) -> dict[str, float]:
        now = time.perf_counter()
        if self._step is not None:
            self._seconds[self._step] = now - self._since
        self._step, self._since = None, now
        return self._seconds
