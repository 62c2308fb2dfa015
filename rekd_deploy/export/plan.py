"""What an export would do, found out before anything slow or lasting is done. torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.export.checkpoint import CheckpointFacts, machine, read_facts
from rekd_deploy.export.engines import plan_engines
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.parity.engines import reason_not_to_run
from rekd_deploy.parity.examples import served_lengths
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import CONFIG_FILE, SINGLE
from rekd_deploy.repository.manifest import newest_folder
from rekd_deploy.repository.reader import GRAPH_MODELS, refuse_foreign_folder
from rekd_deploy.repository.text_endpoint import RAW, raw_configs
from rekd_deploy.repository.workspaces import refuse_unwritable_place
from rekd_deploy.repository.writer import next_versions
from rekd_deploy.runtimes.onnxruntime import check_flavours
from rekd_deploy.runtimes.tensorrt.library import PRODUCTS, load_library
from rekd_train.errors import MissingExtraError


@dataclass(frozen=True)
class ExportPlan:
    """An export that could begin."""

    checkpoint: CheckpointFacts
    root: Path
    options: ExportOptions
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
        facts, options = self.checkpoint, self.options
        return {
            "checkpoint": {
                "path": str(facts.directory),
                "kind": facts.kind,
                "labels": list(facts.labels),
                "operator": facts.operator,
                "capacity": facts.capacity,
                "positions": facts.preprocessor.positions,
                "policy": facts.policy.model_dump(),
                "backbones": {role: backbone.model_dump() for role, backbone in facts.backbones.items()},
                "weight_bytes": facts.weight_bytes,
            },
            "repository": str(self.root),
            "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
            "lengths": list(self.lengths),
            "slots": list(self.slots),
            "batches": list(options.batch_sizes),
            "version": self.version,
            "stays": list(self.stays),
            "goes": list(self.goes),
            "models": list(self.models),
            "kept": list(self.kept),
            "machine": machine(),
            "engines_elsewhere": self.engines_elsewhere,
        }

    def lines(self) -> list[str]:
        """For people."""
        facts, options = self.checkpoint, self.options
        budget = "no budget" if facts.policy.budget is None else f"budget {facts.policy.budget:.1%}"
        widths = ", ".join(
            f"{role} {backbone.family} {backbone.layers} x {backbone.width}"
            for role, backbone in facts.backbones.items()
        )
        here = machine()
        rows = {
            "checkpoint": f"{facts.directory}: {facts.kind}, {len(facts.labels)} labels, {facts.operator}; {widths}",
            "rule": f"{budget}, at least {facts.policy.minimum}; K = {facts.capacity} of "
            f"{facts.preprocessor.positions} positions" + (f", by length {_listed(self.slots)}" if self.slots else ""),
            "graphs": ", ".join(_graphs(self.models)) + (", fused for ONNX Runtime" if options.fuse else ""),
            "precision": options.precision_note,
            "lengths": _listed(self.lengths) or "one size (images)",
            "batches": f"{_listed(options.batch_sizes)}; at most {options.batch_sizes[-1]} in one request",
            "target": options.target + _runs_on(options),
            **({} if self.engines_elsewhere is None else {
                "engines": f"to be built on the target by rekd-export --verify, since here {self.engines_elsewhere}"
            }),
            "machine": f"{here['cores']} cores, {here['gpus'] or 'no'} GPU",
            **({"kept": kept_note(self.kept)} if self.kept else {}),
            "repository": f"{self.root}, {self._replacing()}",
            "models": ", ".join(self.models),
        }
        return [f"{name:<12}{value}" for name, value in rows.items()]

    def _replacing(self) -> str:
        words = f"version {self.version}"
        if self.stays:
            words += f" beside version {_listed(self.stays)}"
        if self.goes:
            words += f"; version {_listed(self.goes)} is removed"
        return words + ("" if self.stays or self.goes else " (new)")


def plan_export(checkpoint: str | Path, root: str | Path, options: ExportOptions) -> ExportPlan:
    """Everything that can be checked about an export without computing anything.

    Raises:
        CheckpointError, ExportError: the checkpoint cannot be exported.
        ConfigError: an option does not fit the checkpoint.
        RepositoryError: the output holds something else, or versions that cannot stay beside the new one.
        MissingExtraError, EngineError: ONNX Runtime is not installed, or twice; the library of the engines is not.
    """
    root = Path(root)
    _check_installed()
    facts = read_facts(checkpoint)
    options.check(facts)
    options = options.with_instances(facts)
    refuse_foreign_folder(root)
    options, kept = _with_what_is_there(options, root, facts)
    refuse_unwritable_place(root)
    preprocessor = served_lengths(facts.preprocessor, facts.policy, options.lengths)
    nothing = Path("not exported yet")
    artefacts = Artefacts(
        facts.signature, nothing, nothing, preprocessor, facts.labels, {"policy": facts.policy.model_dump()},
        nothing if options.single_graph else None,
    )
    elsewhere = None
    if options.product is not None:
        artefacts = plan_engines(artefacts, PRODUCTS[options.product], options.engines)
        if not PRODUCTS[options.product].builds_anywhere:
            elsewhere = reason_not_to_run({"format": options.product, "built_for": []})
        else:
            load_library(options.product)  # its complaints come first
    configs = build_configs(artefacts, options.serving, options.target)
    if options.text_endpoint:
        configs |= raw_configs(artefacts, options.serving)
    versions, _ = next_versions(root, configs, options.keep)
    before = range(1, newest_folder(root) + 1)
    goes = tuple(number for number in before if number not in versions.earlier and _exists(root, number))
    lengths = preprocessor.settings.buckets if facts.kind == "text" else ()
    return ExportPlan(
        facts, root, options, lengths, versions.current, versions.earlier, goes, tuple(configs), kept, elsewhere
    )


def kept_note(models: tuple[str, ...]) -> str:
    """For people: what is exported unasked, and how to leave it out."""
    fixes = " ".join("--no-single-graph" if model == SINGLE else "--no-text-endpoint" for model in models)
    return f"{', '.join(models)}, since the repository has it and clients may be using it; {fixes} leaves it out"


def _with_what_is_there(
    options: ExportOptions, root: Path, facts: CheckpointFacts
) -> tuple[ExportOptions, tuple[str, ...]]:
    """The options with every choice made, and the models that are exported because they are there."""
    options = replace(options, precision=options.precision or options.usual_precision)
    if options.serving.gpu and options.single_graph is None:  # the model that answers soonest there
        options = replace(options, single_graph=True)
    names = {"single_graph": SINGLE, "text_endpoint": RAW[facts.kind]}
    found = {choice: (root / name / CONFIG_FILE).is_file() for choice, name in names.items()}
    open_choices = {choice: there for choice, there in found.items() if getattr(options, choice) is None}
    return replace(options, **open_choices), tuple(names[choice] for choice, there in open_choices.items() if there)


def _check_installed() -> None:
    """What the parity gate runs on must be there before the slow work starts."""
    check_flavours()
    if util.find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", "cpu")


def _exists(root: Path, number: int) -> bool:
    return any((root / name / str(number)).is_dir() for name in GRAPH_MODELS.values())


def _graphs(models: tuple[str, ...]) -> list[str]:
    return [f"{role}.onnx" for role, model in GRAPH_MODELS.items() if model in models]


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _runs_on(options: ExportOptions) -> str:
    if options.product:
        return f", {options.product} engines on a GPU"
    return ", on a GPU" if options.serving.gpu else ", on CPUs"
