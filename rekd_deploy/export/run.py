"""Checkpoint -> verified model repository: the plan, before anything slow or lasting is done, and the export itself."""

from __future__ import annotations

import errno
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.errors import ExportError
from rekd_deploy.export.checkpoint import CheckpointFacts, gate_device, read_facts
from rekd_deploy.export.engines import build_engines, defer_engines, plan_engines
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.parity.engines import prove_engines, reason_not_to_run
from rekd_deploy.parity.examples import served_lengths
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import CONFIG_FILE, ENDPOINTS, SINGLE
from rekd_deploy.repository.manifest import Versions, newest_folder
from rekd_deploy.repository.reader import GRAPH_MODELS, check_repository, refuse_foreign_folder
from rekd_deploy.repository.text_endpoint import endpoint_config
from rekd_deploy.repository.workspaces import Workspace, refuse_unwritable_place
from rekd_deploy.repository.writer import next_versions, write_repository
from rekd_deploy.runtimes.onnxruntime import check_flavours
from rekd_deploy.runtimes.tensorrt import PRODUCTS, load_library
from rekd_train.errors import MissingExtraError

Tune = Callable[[Path], tuple[Mapping[str, Any], Mapping[str, Any]]]
"""A repository -> fields of ``ServingSettings``, and what the manifest keeps under 'tuning'."""


@dataclass(frozen=True)
class ExportPlan:
    """An export that could begin."""

    checkpoint: CheckpointFacts
    root: Path
    options: ExportOptions
    """With every choice made."""
    lengths: tuple[int, ...]
    """Padded lengths of texts; empty for images."""
    version: int
    """Number of the new version."""
    stays: tuple[int, ...]
    """Earlier versions that stay beside it."""
    goes: tuple[int, ...]
    """Earlier versions that are removed."""
    models: tuple[str, ...]
    """Triton's models, each a folder of the repository."""
    kept: tuple[str, ...] = ()
    """Those that clients may be using, exported because the repository that is there has them, not by request."""
    engines_elsewhere: str | None = None
    """Why engines cannot be built here; ``rekd-export --verify`` builds them on the machine that serves them."""

    @property
    def slots(self) -> tuple[int, ...]:
        """K of each of ``lengths``; empty where it is the same for all."""
        rule = self.checkpoint.signature.predictor.slots
        return () if rule is None else tuple(map(rule.at, self.lengths))

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        facts = self.checkpoint
        own = ("lengths", "slots", "version", "stays", "goes", "models", "kept", "engines_elsewhere")
        return {
            "checkpoint": str(facts.directory),
            **{name: getattr(facts, name) for name in ("kind", "labels", "operator", "capacity")},
            "repository": str(self.root),
            "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self.options).items()},
            "batches": self.options.batch_sizes,
            **{name: getattr(self, name) for name in own},
        }


def plan_export(checkpoint: str | Path, root: str | Path, options: ExportOptions) -> ExportPlan:
    """Everything that can be checked about an export without computing anything.

    Raises:
        CheckpointError, ExportError, ConfigError: the checkpoint cannot be exported, or not so.
        RepositoryError: the output holds something else, or versions that cannot stay beside the new one.
        MissingExtraError, EngineError: ONNX Runtime is not installed, or twice; the library of the engines is not.
    """
    root = Path(root)
    check_flavours()
    if util.find_spec("onnxruntime") is None:  # what the parity gate runs on
        raise MissingExtraError("onnxruntime", "cpu")
    facts = read_facts(checkpoint)
    options.check(facts)
    refuse_foreign_folder(root)
    options, kept = _with_what_is_there(options, root, facts)
    refuse_unwritable_place(root)
    preprocessor = served_lengths(facts.preprocessor, facts.policy, options.lengths)
    policy, graph = {"policy": facts.policy.model_dump()}, Path("not exported yet")
    single = graph if options.single_graph else None
    artefacts = Artefacts(facts.signature, graph, graph, preprocessor, facts.labels, policy, single)
    elsewhere = None
    if options.product is not None:
        artefacts = plan_engines(artefacts, PRODUCTS[options.product], options.engines)
        if not PRODUCTS[options.product].builds_anywhere:
            elsewhere = reason_not_to_run({"format": options.product, "built_for": []})
        else:
            load_library(options.product)  # its complaints come first
    configs = build_configs(artefacts, options.serving, options.target)
    if options.text_endpoint:
        endpoint = endpoint_config(artefacts, options.serving, options.target)
        configs[endpoint.name] = endpoint
    versions, _ = next_versions(root, configs, options.keep)
    there = [
        number for number in range(1, newest_folder(root) + 1)
        if any((root / name / str(number)).is_dir() for name in GRAPH_MODELS.values())
    ]  # fmt: skip
    goes = tuple(number for number in there if number not in versions.earlier)
    lengths, stays = preprocessor.settings.buckets if facts.kind == "text" else (), versions.earlier
    return ExportPlan(facts, root, options, lengths, versions.current, stays, goes, tuple(configs), kept, elsewhere)


def _with_what_is_there(
    options: ExportOptions, root: Path, facts: CheckpointFacts
) -> tuple[ExportOptions, tuple[str, ...]]:
    """The options with every choice made, and the models that are exported because they are there."""
    options = replace(options, precision=options.precision or options.usual_precision)
    # engines take long to build and fill a GPU: one more is built by request
    usual = {"single_graph": options.product is None, "text_endpoint": options.target == "python"}
    chosen = {choice: True for choice, is_usual in usual.items() if is_usual and getattr(options, choice) is None}
    options = replace(options, **chosen)
    names = {"single_graph": SINGLE, "text_endpoint": ENDPOINTS[facts.kind]}
    there = {
        choice: (root / name / CONFIG_FILE).is_file()
        for choice, name in names.items() if getattr(options, choice) is None
    }  # fmt: skip
    return replace(options, **there), tuple(names[choice] for choice in there if there[choice])


@dataclass(frozen=True)
class Publication:
    """A repository that was written, and how it came to be."""

    plan: ExportPlan
    manifest: dict[str, Any]
    seconds: dict[str, float]
    """Wall time of each step, in order."""
    not_proved_there: str = ""
    """Why the gate did not run on the GPU that will serve the graphs; '': it did, or none will."""

    @property
    def root(self) -> Path:
        """The repository."""
        return self.plan.root

    @property
    def version(self) -> int:
        """Number of the version that serves from now on."""
        return Versions.of(self.manifest).current

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        manifest = self.manifest
        return {
            "repository": str(self.root), "version": self.version, "kept": self.plan.kept,
            "not_proved_there": self.not_proved_there, "artefacts": manifest["artefacts"],
            "parity": manifest["parity"], "manifest": manifest,
            "seconds": {step: round(seconds, 3) for step, seconds in self.seconds.items()},
        }


def publish(
    checkpoint: str | Path, root: str | Path, *, options: ExportOptions | None = None,
    report: Callable[[str], None] = lambda step: None, tune: Tune | None = None, **changes: Any,
) -> Publication:
    """Export a checkpoint, prove the graphs equal to the model, and put them in a Triton repository.

    An older repository at ``root`` serves on until the new one is whole, and stays if anything fails.

    Args:
        options: how; None: the defaults.
        report: called with the name of each step as it starts.
        tune: chooses settings of the server by measuring a repository that nobody serves yet, before it is published.
        changes: fields of ``ExportOptions``, in place of those in ``options``: ``publish(c, r, keep=2)``.

    Raises:
        ConfigError, CheckpointError, ExportError, ParityError, EngineError, MissingExtraError, RepositoryError,
        InputError.
    """
    root = Path(root)
    plan = plan_export(checkpoint, root, replace(options or ExportOptions(), **changes))  # refuses before torch loads
    options, serving = plan.options, plan.options.serving
    device, not_proved_there = gate_device(options)
    starts: list[tuple[str, float]] = []

    def clock(step: str) -> None:
        starts.append((step, time.perf_counter()))
        report(step)

    clock("load")
    from rekd_deploy.export.graphs import export  # loads torch

    with _room(Path(tempfile.gettempdir()), "set TMPDIR to a larger folder"), Workspace("rekd-export-") as work:
        artefacts = export(
            plan.checkpoint.directory, work.path, single_graph=options.single_graph, fused=options.fuse,
            gpu=options.on_gpu, device=device, precision=options.precision, for_engine=options.product is not None,
            unattended=options.target != "python", threads=serving.threads, lengths=options.lengths,
            parity_texts=options.parity_texts, report=clock,
        )
        if plan.engines_elsewhere:
            artefacts = defer_engines(artefacts, PRODUCTS[options.product], options.engines)
        elif options.product is not None:
            artefacts = build_engines(artefacts, work.path, load_library(options.product), options.engines, clock)
            artefacts = prove_engines(artefacts, report=clock)
        if tune is not None:
            clock("tune")
            trial = write_repository(artefacts, work.path / "trial", target=options.target, **vars(serving))
            better, figures = tune(trial)
            serving = replace(serving, **better)
            artefacts = replace(artefacts, manifest={**artefacts.manifest, "tuning": figures})
        clock("repository")
        with _room(root, "choose another --output"):
            write_repository(
                artefacts, root, target=options.target, keep=options.keep,
                text_endpoint=options.text_endpoint, **vars(serving),
            )
    ends = [*(start for _, start in starts[1:]), time.perf_counter()]
    seconds = {step: end - start for (step, start), end in zip(starts, ends, strict=True)}
    return Publication(plan, check_repository(root), seconds, not_proved_there)


@contextmanager
def _room(place: Path, fix: str) -> Iterator[None]:
    """Turn a full disk into one line that names the place and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        intact = "nothing was written and an older repository is as it was"
        reason = f"no room for the export at {place}: {error.strerror}; {intact}"
        raise ExportError(f"{reason}; fix: free some space, or {fix}") from None
