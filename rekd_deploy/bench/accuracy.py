"""How good are the served predictions, given the rationale alone, and are they still the checkpoint's?

Figures of a result of the kind 'accuracy':

    classification   accuracy, macro_f1, per_class (precision, recall, f1, support, predicted)
    rate             what the predictions were made from: kept / real features, counts (``metrics.selection_summary``)
    calibration      nll, brier, ece, ece_equal_mass of the served probabilities; ``reliability``, the bins of the ECE
    curve            of 'served' and 'checkpoint': rates, realised, accuracies, area, note
    reference        the checkpoint's accuracy on the same examples by PyTorch, and the gap in points
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench import results
from rekd_deploy.bench.examples import features_of, labelled_examples
from rekd_deploy.bench.subject import ServedGraphs, TorchPair, rate_curve
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.repository.reader import read_manifest
from rekd_train.inputs.policy import SelectionPolicy

if TYPE_CHECKING:
    from rekd_deploy.client.client import Client
    from rekd_deploy.client.pipeline import Pipeline

LIMITS = {"int8": 1.0}
"""Largest gap to the checkpoint's accuracy in points by precision; ``LIMIT`` for the others."""
LIMIT = 0.5
_CHUNK = 256


def measure_accuracy(
    repository: Path | None = None, url: str | None = None, checkpoint: Path | None = None, data: str | None = None,
    overrides: Sequence[str] = (), split: str = "test", examples: int | None = None, limit: float | None = None, *,
    single_graph: bool = False, engine: bool = False, device: str | None = None,
    progress: results.Progress = results.silent,
) -> results.Result:  # fmt: skip
    """Predict labelled examples by the served model and measure the predictions; see ``rekd-bench accuracy --help``.

    Raises:
        BenchmarkError: the checkpoint is not the one that was exported.
        RekdError: the repository, the server, the data or the checkpoint cannot be used.
    """
    from rekd_train.data import encode
    from rekd_train.evaluation.metrics import selection_summary

    manifest, policy, predictions = None, None, []
    with _client(repository, url, single_graph, engine, device) as client:
        description = client.description
        labels = list(description.labels)
        if repository is not None:
            manifest = read_manifest(repository)
            policy = SelectionPolicy.model_validate(manifest["policy"])
        if checkpoint is not None:
            check_belongs(checkpoint, manifest, labels)
        measured = labelled_examples(labels, checkpoint, data, overrides, split).head(examples)
        for start in range(0, len(measured.items), _CHUNK):
            predictions += client.predict(measured.items[start : start + _CHUNK])
            progress("predicting", len(predictions), len(measured.items))
    if manifest is None and checkpoint is not None:
        from rekd_deploy.export.checkpoint import read_facts

        policy = read_facts(checkpoint).policy
    preprocessor = description.preprocessor()
    encoded = encode(measured.examples, preprocessor)
    features = features_of(encoded, preprocessor, full_width=policy is not None and policy.selectable == "all")
    probabilities = np.array([list(each.probabilities.values()) for each in predictions])
    kept = np.array([len(each.pieces) or len(each.rationale) for each in predictions])
    limits = None if policy is None else policy.limits(features.counts)
    figures = prediction_figures(probabilities, encoded.labels, labels) | {
        "rate": selection_summary(kept, features.counts, limits, preprocessor.positions), "curve": {}
    }  # fmt: skip
    inputs, precision = {"data": results.items_input(measured.items, measured.origin, encoded.labels)}, "unknown"
    if manifest is not None:
        used = {manifest["artefacts"][role]["precision"] for role in ("selector", "predictor")}
        precision = next(name for name in ("int8", "bf16", "fp16", "fp32") if name in used)
        inputs["repository"] = results.repository_input(repository)
        with ServedGraphs(repository, engine=engine) as subject:
            figures["curve"]["served"] = rate_curve(subject, features, encoded.labels)
    else:
        inputs["server"] = results.Input(name=str(url))
    if checkpoint is not None:
        from rekd_train.checkpoints.checkpoint import load
        from rekd_train.evaluation.forward import measure

        pair, note = load(checkpoint), "by the checkpoint in PyTorch, not by what is served"
        inputs["checkpoint"] = results.checkpoint_input(checkpoint)
        figures["curve"]["checkpoint"] = rate_curve(TorchPair(pair), features, encoded.labels) | {"note": note}
        found = measure(pair, encoded)
        figures["reference"] = {name: found[name] for name in ("accuracy", "rate", "examples")} | {"source": "PyTorch"}
    limit = limit if limit is not None else LIMITS.get(precision, LIMIT)
    check = gap_check(figures["classification"]["accuracy"], figures.get("reference"), limit, len(encoded))
    return results.result("accuracy", figures, inputs=inputs, checks=[check], settings={
        "split": split, "examples": len(encoded), "precision": precision, "engine": engine, "device": device,
        "answered_by": "server" if url else "pipeline", "single_graph": single_graph, "limit_points": limit,
    })  # fmt: skip


def prediction_figures(probabilities: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The sections ``classification`` and ``calibration`` from (n, C) probabilities and (n,) labels."""
    from rekd_train.evaluation import metrics

    predicted = probabilities.argmax(axis=1)
    return {
        "classification": {
            "accuracy": metrics.accuracy(probabilities, labels), "macro_f1": metrics.macro_f1(predicted, labels),
            "per_class": metrics.per_class(predicted, labels, names),
        },
        "calibration": {
            **metrics.calibration(probabilities, labels), "reliability": metrics.reliability(probabilities, labels),
        },
    }


def gap_check(served: float, reference: dict[str, Any] | None, limit: float, examples: int) -> results.Check:
    """Compare the served accuracy with the checkpoint's.

    Args:
        reference: ``accuracy``; gets ``gap_points``. None: there is nothing to compare with.
        limit: percentage points, either way.
    """
    name = "served as trained"
    if reference is None:
        return results.not_applicable(name, "no --checkpoint to compare the predictions with", limit)
    gap = round(100 * (served - reference["accuracy"]), 6)  # 0.5 points are 0.5, not a hair more
    reference["gap_points"] = gap
    words = (
        f"{served:.2%} of {examples} examples, the checkpoint {reference['accuracy']:.2%} in PyTorch: {gap:+.2f} "
        f"points (limit {limit:g})"
    )
    return results.verdict(name, abs(gap) <= limit, words, gap, limit)


def _client(
    repository: Path | None, url: str | None, single: bool, engine: bool, device: str | None
) -> Pipeline | Client:
    if url is None:
        from rekd_deploy.client.pipeline import Pipeline

        return Pipeline(repository, single_graph=single, engine=engine, device=device)
    if engine or device is not None:
        raise BenchmarkError("--engine and --device are for a repository; a server has chosen its own")
    from rekd_deploy.client.client import Client
    from rekd_deploy.repository.config import ENSEMBLE, SINGLE

    return Client(url, model=SINGLE if single else ENSEMBLE, lone=None)


def check_belongs(checkpoint: Path, manifest: dict[str, Any] | None, labels: list[str]) -> None:
    """Raise BenchmarkError for a checkpoint that cannot be what is served; a server has labels and no manifest."""
    from rekd_train.checkpoints import read_description
    from rekd_train.checkpoints.checkpoint import checkpoint_hash

    theirs = read_description(checkpoint)["labels"]
    if manifest is None and labels != theirs:
        raise BenchmarkError(
            f"the server predicts the labels {', '.join(labels[:4])}, {checkpoint} has {', '.join(theirs[:4])}; fix: "
            "give the checkpoint that is served"
        )
    if manifest is not None and (digest := checkpoint_hash(checkpoint)) != manifest["checkpoint_sha256"]:
        raise BenchmarkError(
            f"the repository was exported from the checkpoint {manifest['checkpoint_sha256'][:12]}, but {checkpoint} "
            f"is {digest[:12]}; fix: give the right checkpoint, or export this one"
        )
