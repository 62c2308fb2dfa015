"""Checkpoint -> verified model repository, in one call."""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rekd_deploy.errors import ExportError
from rekd_deploy.export.checkpoint import gate_device
from rekd_deploy.export.engines import build_engines, defer_engines
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.export.plan import plan_export
from rekd_deploy.parity.engines import prove_engines
from rekd_deploy.repository.manifest import Versions, verify_files
from rekd_deploy.repository.reader import graph_path, read_manifest
from rekd_deploy.repository.workspaces import Workspace
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.runtimes.tensorrt.library import PRODUCTS, load_library


@dataclass(frozen=True)
class Publication:
    """A repository that was written, and how it came to be."""

    root: Path
    manifest: dict[str, Any]
    seconds: dict[str, float]
    """Wall time of each step, in order."""
    kept: tuple[str, ...] = ()
    """Models that were exported because the repository had them, not by request."""
    precision: str = ""
    """What was requested, and whether it is the default; for people."""
    not_proved_there: str = ""
    """Why the gate did not run on the GPU that will serve the graphs; '': it did, or none will."""

    @property
    def version(self) -> int:
        """Number of the version that serves from now on."""
        return Versions.of(self.manifest).current

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "repository": str(self.root),
            "version": self.version,
            "kept": list(self.kept),
            "not_proved_there": self.not_proved_there,
            "artefacts": self.manifest["artefacts"],
            "parity": self.manifest["parity"],
            "manifest": self.manifest,
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }


def publish(
    checkpoint: str | Path,
    root: str | Path,
    *,
    options: ExportOptions | None = None,
    report: Callable[[str], None] = lambda step: None,
    **changes: Any,
) -> Publication:
    """Export a checkpoint, prove the graphs equal to the model, and put them in a Triton repository.

    An older repository at ``root`` serves on until the new one is whole, and stays if anything fails.

    Args:
        checkpoint: directory written by rekd-train.
        root: the repository.
        options: how; None: the defaults.
        report: called with the name of each step as it starts.
        changes: fields of ``ExportOptions``, in place of those in ``options``: ``publish(c, r, keep=2)``.

    Raises:
        ConfigError, CheckpointError, ExportError, ParityError, EngineError, MissingExtraError, RepositoryError,
        InputError.
    """
    root = Path(root)
    options = replace(options or ExportOptions(), **changes)
    plan = plan_export(checkpoint, root, options)  # whatever can be refused is refused before torch is loaded
    options = plan.options
    device, not_proved_there = gate_device(options)
    clock = _Clock(report)
    clock("load")
    from rekd_deploy.export.graphs import export  # loads torch

    with _room(Path(tempfile.gettempdir()), "set TMPDIR to a larger folder"), Workspace("rekd-export-") as work:
        artefacts = export(
            plan.checkpoint.directory, work.path, single_graph=options.single_graph, fused=options.fuse,
            gpu=options.serving.gpu, device=device,
            precision=options.precision, for_engine=options.product is not None,
            unattended=options.target != "python", threads=options.serving.threads,
            lengths=options.lengths, parity_texts=options.parity_texts, report=clock,
        )
        if plan.engines_elsewhere:
            artefacts = defer_engines(artefacts, PRODUCTS[options.product], options.engines)
        elif options.product is not None:
            artefacts = build_engines(
                artefacts, work.path, load_library(options.product), options.engines, report=clock
            )
            artefacts = prove_engines(artefacts, report=clock)
        clock("repository")
        serving = options.serving
        with _room(root, "choose another --output"):
            write_repository(
                artefacts, root, target=options.target, max_batch_size=serving.max_batch_size,
                preferred_batch_sizes=serving.preferred_batch_sizes, keep=options.keep, gpu=serving.gpu,
                gpus=serving.gpus, rate_limit=serving.rate_limit, instances=serving.instances, threads=serving.threads,
                queue_delay_us=serving.queue_delay_us, text_endpoint=options.text_endpoint,
            )
    manifest = read_manifest(root)
    verify_files(manifest, {role: graph_path(root, manifest, role) for role in artefacts.graphs})
    return Publication(root, manifest, clock.stop(), plan.kept, options.precision_note, not_proved_there)


@contextmanager
def _room(place: Path, fix: str) -> Iterator[None]:
    """Turn a full disk into one line that names the place and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ExportError(
            f"no room for the export at {place}: {error.strerror}; nothing was written and an older repository is as "
            f"it was; fix: free some space, or {fix}"
        ) from None


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
