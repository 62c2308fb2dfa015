"""How good are the served answers, given the rationale alone, and are they still the checkpoint's?

Figures of a result of the kind 'accuracy':

    classification   accuracy, macro_f1, per_class (precision, recall, f1, support, predicted)
    rate             what the answers were made from: kept / real features and counts (``metrics.rate_summary``)
    calibration      nll, brier, ece, ece_equal_mass of the served probabilities; ``reliability``, the bins of the ECE
    curve            by who answered ('served', 'checkpoint'): rates, realised, accuracies, area, note
    reference        the checkpoint's accuracy, where it comes from, and the gap in points
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.curve import checkpoint_curve, served_curve
from rekd_deploy.bench.features import features_of
from rekd_deploy.bench.labelled import Labelled, labelled_examples
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.result_inputs import checkpoint_input, repository_input
from rekd_deploy.bench.results import Check, Input, Result, result
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.repository.reader import read_manifest
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.prediction import Prediction

if TYPE_CHECKING:
    from rekd_deploy.client.client import Client
    from rekd_deploy.client.pipeline import Pipeline
    from rekd_train.data import Split

LIMITS = {"int8": 1.0}
"""Largest gap to the checkpoint's accuracy in points by precision; ``LIMIT`` for the others."""
LIMIT = 0.5
_CHUNK = 256


@dataclass(frozen=True)
class AccuracyOptions:
    """What to measure; see ``rekd-bench accuracy --help``."""

    repository: Path | None = None
    url: str | None = None
    checkpoint: Path | None = None
    data: str | None = None
    overrides: tuple[str, ...] = ()
    split: str = "test"
    examples: int | None = None
    limit: float | None = None
    single_graph: bool = False
    engine: bool = False
    device: str | None = None


def measure_accuracy(options: AccuracyOptions, progress: Progress = silent) -> Result:
    """Ask the served model about labelled examples and measure its answers.

    Raises:
        BenchmarkError: the checkpoint is not the one that was exported.
        RekdError: the repository, the server, the data or the checkpoint cannot be used.
    """
    with ExitStack() as stack:
        answerer = stack.enter_context(_answerer(options))
        description = answerer.description
        manifest = read_manifest(options.repository) if options.repository is not None else None
        if options.checkpoint is not None:
            check_belongs(options.checkpoint, manifest, list(description.labels))
        whole = labelled_examples(
            description.labels, checkpoint=options.checkpoint, data=options.data, overrides=options.overrides,
            split=options.split,
        )  # fmt: skip
        measured = whole.head(options.examples)
        predictions = _predictions(answerer, measured, progress)
    from rekd_train.data import encode

    preprocessor = description.preprocessor()
    split = encode(measured.examples, preprocessor)
    policy = _policy(options, manifest)
    features = features_of(split, preprocessor, full_width=policy is not None and policy.selectable == "all")
    probabilities = np.array([list(each.probabilities.values()) for each in predictions])
    figures: dict[str, Any] = answer_figures(probabilities, measured.labels, list(description.labels))
    figures["rate"] = rates(predictions, features.counts, policy, preprocessor.positions)
    curves = {}
    if options.repository is not None:
        curves["served"] = served_curve(options.repository, features, measured.labels, options.engine, progress)
    if options.checkpoint is not None:
        curves["checkpoint"] = checkpoint_curve(options.checkpoint, split, progress)
    figures["curve"] = curves
    precision = _precision(manifest)
    limit = options.limit if options.limit is not None else LIMITS.get(precision, LIMIT)
    reference = None
    if options.checkpoint is not None:
        reference = checkpoint_accuracy(options, measured, split, len(whole.labels))
        figures["reference"] = reference
    served = figures["classification"]["accuracy"]
    return result(
        "accuracy", figures, inputs=_inputs(options, measured, manifest),
        settings={
            "split": options.split, "examples": len(measured.labels), "precision": precision,
            "answered_by": "server" if options.url else "pipeline", "single_graph": options.single_graph,
            "engine": options.engine, "device": options.device, "limit_points": limit,
        },
        checks=[gap_check(served, reference, limit, len(measured.labels))],
    )  # fmt: skip


def answer_figures(probabilities: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The sections ``classification`` and ``calibration`` from (n, C) probabilities and (n,) labels."""
    from rekd_train.evaluation import metrics

    predicted = probabilities.argmax(axis=1)
    return {
        "classification": {
            "accuracy": metrics.accuracy(probabilities, labels),
            "macro_f1": metrics.macro_f1(predicted, labels),
            "per_class": metrics.per_class(predicted, labels, names),
        },
        "calibration": {
            "nll": metrics.negative_log_likelihood(probabilities, labels),
            "brier": metrics.brier_score(probabilities, labels),
            "ece": metrics.expected_calibration_error(probabilities, labels),
            "ece_equal_mass": metrics.expected_calibration_error(probabilities, labels, equal_mass=True),
            "reliability": metrics.reliability(probabilities, labels),
        },
    }


def rates(
    predictions: list[Prediction], counts: np.ndarray, policy: SelectionPolicy | None, positions: int
) -> dict[str, float]:
    """What the answers were made from.

    Args:
        counts: (n,) real features of each example.
        policy: with its budget; None: unknown, and not counted.
        positions: of the model.
    """
    from rekd_train.evaluation.metrics import rate_summary

    kept = np.array([len(each.pieces) or len(each.rationale) for each in predictions])
    return rate_summary(kept, counts, None if policy is None else policy.limits(counts), positions)


def gap_check(served: float, reference: dict[str, Any] | None, limit: float, examples: int) -> Check:
    """Hold the served accuracy against the checkpoint's.

    Args:
        reference: as ``checkpoint_accuracy`` makes it; gets ``gap_points``. None: there is nothing to hold against.
        limit: percentage points, either way.
    """
    name = "served as trained"
    if reference is None:
        return Check(name=name, outcome="not applicable", words="no --checkpoint to hold the answers against",
                     limit=limit)  # fmt: skip
    gap = round(100 * (served - reference["accuracy"]), 6)  # 0.5 points are 0.5, not a hair more
    reference["gap_points"] = gap
    words = (
        f"{served:.2%} of {examples} examples, the checkpoint {reference['accuracy']:.2%} ({reference['source']}): "
        f"{gap:+.2f} points (limit {limit:g})"
    )
    return Check(
        name=name, outcome="passed" if abs(gap) <= limit else "failed", words=words, value=gap, limit=limit
    )


def checkpoint_accuracy(options: AccuracyOptions, measured: Labelled, split: Split, whole: int) -> dict[str, Any]:
    """The checkpoint's accuracy: what its metrics.json says of the same examples, else measured here by PyTorch.

    Args:
        whole: examples of the split before --examples; only then its stored figures are about these.
    """
    from rekd_train.checkpoints import checkpoint
    from rekd_train.evaluation.forward import measure

    stored = checkpoint.read_metrics(options.checkpoint).get(options.split)
    complete = isinstance(stored, dict) and {"accuracy", "examples"} <= set(stored)
    if complete and measured.own and len(measured.labels) == whole == stored["examples"]:
        found, source = stored, "metrics.json"
    else:
        found, source = measure(checkpoint.load(options.checkpoint), split), "PyTorch, on the same examples"
    return {
        "accuracy": found["accuracy"], "rate": found.get("rate"), "examples": found["examples"], "source": source
    }


def _answerer(options: AccuracyOptions) -> Pipeline | Client:
    if options.url is not None:
        if options.engine or options.device is not None:
            raise BenchmarkError("--engine and --device are for a repository; a server has chosen its own")
        from rekd_deploy.client.client import Client
        from rekd_deploy.repository.config import ENSEMBLE, SINGLE

        return Client(options.url, model=SINGLE if options.single_graph else ENSEMBLE)
    from rekd_deploy.client.pipeline import Pipeline

    return Pipeline(
        options.repository, single_graph=options.single_graph, engine=options.engine, device=options.device
    )


def _predictions(answerer: Pipeline | Client, measured: Labelled, progress: Progress) -> list[Prediction]:
    items, predictions = measured.items, []
    for start in range(0, len(items), _CHUNK):
        predictions += answerer.predict(items[start : start + _CHUNK])
        progress("asking the served model", len(predictions), len(items))
    return predictions


def check_belongs(checkpoint: Path, manifest: dict[str, Any] | None, labels: list[str]) -> None:
    """Refuse a checkpoint that cannot be what is served.

    Args:
        manifest: of the repository; None: a server, which tells its labels alone.

    Raises:
        BenchmarkError: names both.
    """
    from rekd_train.checkpoints.checkpoint import checkpoint_hash, read_description

    theirs = read_description(checkpoint)["labels"]
    if manifest is None:
        if labels != theirs:
            raise BenchmarkError(
                f"the server answers with the labels {', '.join(labels[:4])}, {checkpoint} has "
                f"{', '.join(theirs[:4])}; fix: give the checkpoint that is served"
            )
        return
    digest = checkpoint_hash(checkpoint)
    if digest != manifest["checkpoint_sha256"]:
        raise BenchmarkError(
            f"the repository was exported from the checkpoint {manifest['checkpoint_sha256'][:12]}, but {checkpoint} "
            f"is {digest[:12]}; fix: give the right checkpoint, or export this one"
        )


def _policy(options: AccuracyOptions, manifest: dict[str, Any] | None) -> SelectionPolicy | None:
    if manifest is not None:
        return SelectionPolicy.model_validate(manifest["policy"])
    if options.checkpoint is not None:
        from rekd_deploy.export.checkpoint import read_facts

        return read_facts(options.checkpoint).policy
    return None


def _precision(manifest: dict[str, Any] | None) -> str:
    """Of the graphs, as asked for; the lowest of the two; 'unknown' of a server."""
    if manifest is None:
        return "unknown"
    asked = {manifest["artefacts"][role]["precision"] for role in ("selector", "predictor")}
    return next(name for name in ("int8", "bf16", "fp16", "fp32") if name in asked)


def _inputs(options: AccuracyOptions, measured: Labelled, manifest: dict[str, Any] | None) -> dict[str, Input]:
    inputs = {"data": measured.input()}
    if manifest is not None:
        inputs["repository"] = repository_input(options.repository)
    else:
        inputs["server"] = Input(name=str(options.url))
    if options.checkpoint is not None:
        inputs["checkpoint"] = checkpoint_input(options.checkpoint)
    return inputs
