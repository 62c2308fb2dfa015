"""How good are the served predictions, given the rationale alone, and are they still the checkpoint's?

Figures of a result of the kind 'accuracy':

    classification   accuracy, macro_f1, per_class (precision, recall, f1, support, predicted)
    rate             what the predictions were made from: kept / real features, counts (``metrics.selection_summary``)
    calibration      nll, brier, ece, ece_equal_mass of the served probabilities; ``reliability``, the bins of the ECE
    curve            of 'served' and 'checkpoint': rates, realised, accuracies, area, note
    reference        the checkpoint's accuracy, where it comes from, and the gap in points
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.examples import Labelled, features_of, labelled_examples
from rekd_deploy.bench.results import (
    Check,
    Input,
    Progress,
    Result,
    checkpoint_input,
    items_input,
    repository_input,
    result,
    silent,
)
from rekd_deploy.bench.subject import ServedGraphs, checkpoint_curve, subject_curve
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.repository.reader import read_manifest
from rekd_train.inputs.policy import SelectionPolicy

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
    """Predict labelled examples by the served model and measure the predictions.

    Raises:
        BenchmarkError: the checkpoint is not the one that was exported.
        RekdError: the repository, the server, the data or the checkpoint cannot be used.
    """
    manifest, predictions = None, []
    with ExitStack() as stack:
        client = stack.enter_context(_client(options))
        description = client.description
        if options.repository is not None:
            manifest = read_manifest(options.repository)
        if options.checkpoint is not None:
            check_belongs(options.checkpoint, manifest, list(description.labels))
        whole = labelled_examples(
            description.labels, checkpoint=options.checkpoint, data=options.data, overrides=options.overrides,
            split=options.split,
        )  # fmt: skip
        measured = whole.head(options.examples)
        for start in range(0, len(measured.items), _CHUNK):
            predictions += client.predict(measured.items[start : start + _CHUNK])
            progress("asking the served model", len(predictions), len(measured.items))
    from rekd_train.data import encode
    from rekd_train.evaluation.metrics import selection_summary

    preprocessor, labels = description.preprocessor(), measured.labels
    split, policy = encode(measured.examples, preprocessor), _policy(options, manifest)
    features = features_of(split, preprocessor, full_width=policy is not None and policy.selectable == "all")
    probabilities = np.array([list(each.probabilities.values()) for each in predictions])
    kept = np.array([len(each.pieces) or len(each.rationale) for each in predictions])
    limits = None if policy is None else policy.limits(features.counts)
    figures = prediction_figures(probabilities, labels, list(description.labels)) | {
        "rate": selection_summary(kept, features.counts, limits, preprocessor.positions), "curve": {}
    }  # fmt: skip
    inputs = {"data": items_input(measured.items, measured.origin, labels)}
    if options.repository is not None:
        inputs["repository"] = repository_input(options.repository)
        with ServedGraphs(options.repository, engine=options.engine) as subject:
            figures["curve"]["served"] = subject_curve(subject, features, labels, progress)
    else:
        inputs["server"] = Input(name=str(options.url))
    if options.checkpoint is not None:
        inputs["checkpoint"] = checkpoint_input(options.checkpoint)
        figures["curve"]["checkpoint"] = checkpoint_curve(options.checkpoint, split, progress)
        figures["reference"] = checkpoint_accuracy(options, measured, split, len(whole.labels))
    precision = _precision(manifest)
    limit = options.limit if options.limit is not None else LIMITS.get(precision, LIMIT)
    check = gap_check(figures["classification"]["accuracy"], figures.get("reference"), limit, len(labels))
    return result("accuracy", figures, inputs=inputs, checks=[check], settings={
        "split": options.split, "examples": len(labels), "precision": precision,
        "answered_by": "server" if options.url else "pipeline", "single_graph": options.single_graph,
        "engine": options.engine, "device": options.device, "limit_points": limit,
    })  # fmt: skip


def prediction_figures(probabilities: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The sections ``classification`` and ``calibration`` from (n, C) probabilities and (n,) labels."""
    from rekd_train.evaluation import metrics

    predicted = probabilities.argmax(axis=1)
    return {
        "classification": {
            "accuracy": metrics.accuracy(probabilities, labels),
            "macro_f1": metrics.macro_f1(predicted, labels),
            "per_class": metrics.per_class(predicted, labels, names),
        },
        "calibration": metrics.calibration(probabilities, labels)
        | {"reliability": metrics.reliability(probabilities, labels)},
    }


def gap_check(served: float, reference: dict[str, Any] | None, limit: float, examples: int) -> Check:
    """Compare the served accuracy with the checkpoint's.

    Args:
        reference: as ``checkpoint_accuracy`` makes it; gets ``gap_points``. None: there is nothing to compare with.
        limit: percentage points, either way.
    """
    name = "served as trained"
    if reference is None:
        words = "no --checkpoint to compare the predictions with"
        return Check(name=name, outcome="not applicable", words=words, limit=limit)
    gap = round(100 * (served - reference["accuracy"]), 6)  # 0.5 points are 0.5, not a hair more
    reference["gap_points"] = gap
    words = (
        f"{served:.2%} of {examples} examples, the checkpoint {reference['accuracy']:.2%} ({reference['source']}): "
        f"{gap:+.2f} points (limit {limit:g})"
    )
    return Check(name=name, outcome="passed" if abs(gap) <= limit else "failed", words=words, value=gap, limit=limit)


def checkpoint_accuracy(options: AccuracyOptions, measured: Labelled, split: Split, whole: int) -> dict[str, Any]:
    """The checkpoint's accuracy: what its metrics.json says of the same examples, else measured here by PyTorch.

    Args:
        whole: examples of the split before --examples; only then its stored figures are about these.
    """
    from rekd_train.checkpoints import checkpoint
    from rekd_train.evaluation.forward import measure

    found, source = checkpoint.read_metrics(options.checkpoint).get(options.split), "metrics.json"
    complete = isinstance(found, dict) and {"accuracy", "examples"} <= set(found)
    if not (complete and measured.own and len(measured.labels) == whole == found["examples"]):
        found, source = measure(checkpoint.load(options.checkpoint), split), "PyTorch, on the same examples"
    return {
        "accuracy": found["accuracy"], "rate": found.get("rate"), "examples": found["examples"], "source": source
    }


def _client(options: AccuracyOptions) -> Pipeline | Client:
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


def check_belongs(checkpoint: Path, manifest: dict[str, Any] | None, labels: list[str]) -> None:
    """Refuse a checkpoint that cannot be what is served.

    Args:
        manifest: of the repository; None: a server, which tells its labels alone.

    Raises:
        BenchmarkError: names both.
    """
    from rekd_train.checkpoints.checkpoint import checkpoint_hash
    from rekd_train.checkpoints.description import read_description

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
    """Of the graphs, as exported; the lowest of the two; 'unknown' of a server."""
    if manifest is None:
        return "unknown"
    found = {manifest["artefacts"][role]["precision"] for role in ("selector", "predictor")}
    return next(name for name in ("int8", "bf16", "fp16", "fp32") if name in found)
