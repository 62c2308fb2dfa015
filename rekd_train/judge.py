"""An independent judge: a classifier that has learnt to read any subset of the features, and has seen no rationale.

The predictor that was trained with its selector cannot tell whether a rationale carries the evidence: the two may have
agreed on a code. The judge (as EVAL-X: Jethani et al. 2021) has the predictor's family and sizes, fresh weights and
another seed, and is trained on random features at random rates, the others removed as in the predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rekd_train.checkpoints import checkpoint, read_description
from rekd_train.checkpoints.recorded import data_for, recorded_config
from rekd_train.config.run import BackboneConfig, DataConfig, OptimisationConfig, RunConfig
from rekd_train.data import Split, encode_splits
from rekd_train.errors import CheckpointError
from rekd_train.evaluation.forward import run_masks, run_selector
from rekd_train.evaluation.metrics import accuracy
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.models.families import fresh_pair
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.loop import Loop, Stage
from rekd_train.training.objectives import ClassifierObjective
from rekd_train.training.runtime import Runtime, chosen_device
from rekd_train.training.state import Observer
from rekd_train.training.validation import calibrate_temperature

LOWEST_RATE = 0.01  # rates are 0.01 + 0.99 u^2, u uniform: half of them below 0.26, for rationales are small
MASKED_SHARE = 0.9  # of the batches; the others show everything, so that the full input is familiar, too
ANOTHER_SEED = 7919  # added to the run's: the judge shares neither initial weights nor order with the pair


def fit_judge(config: RunConfig, judge: Rationalizer, train: Split, *, epochs: float,
              observer: Observer | None = None) -> Rationalizer:
    """Train a judge's predictor in place by its operator; the selector of the pair that carries it stays unused.

    ``config``: of the run that is judged; its optimisation and acceleration are used. ``judge``: a fresh pair, with the
    operator and the ``selectable`` rule of the model; it will keep everything.
    """
    selection = config.selection.model_dump() | {"target": LOWEST_RATE}
    stages = config.stages.model_dump() | {"masked_share": MASKED_SHARE, "evaluate_every": 0}
    changed = {"seed": config.seed + ANOTHER_SEED, "selection": selection, "stages": stages}
    config = RunConfig.model_validate(config.model_dump() | changed)
    runtime = Runtime(next(judge.parameters()).device)
    loop = Loop(config, judge, train, runtime, observer or Observer())
    stage = Stage("judge", 0, epochs)
    loop.run(stage, ClassifierObjective(config, judge, runtime, loop.seed(stage)))
    judge.policy = SelectionPolicy(bias=None, budget=None, minimum=0, selectable=judge.policy.selectable)
    return judge.eval()


def judge_run(path: Path, output: Path, *, epochs: float | None = None, observer: Observer | None = None,
              device: str = "auto", data: str | Path | None = None, overrides: Sequence[str] = ()) -> Rationalizer:
    """The judge of a checkpoint: read where it was trained before, else trained and written.

    ``epochs`` None: those of the run's classifier stage, at least 2; a judge that is there is taken as it is.
    ``data``: where the checkpoint records none: a preset or file whose data to train on.
    CheckpointError: ``output`` holds something else, or the judge of another model.
    """
    judged = checkpoint.load(path)
    config = recorded_config(path, data, overrides)
    # what a judge must agree in to be that of a model: what it reads, how, and what it has learnt from
    seed, data_read = config.seed + ANOTHER_SEED, config.data.model_copy(update={"test_examples": None})
    sections = {"predictor": config.predictor, "optimisation": config.optimisation, "data": data_read}
    identity = {
        "operator": judged.predictor.operator, "selectable": judged.policy.selectable, "labels": judged.labels,
        "preprocessing_sha256": judged.preprocessor.fingerprint, "seed": seed,
        **{name: section.model_dump(mode="json") for name, section in sections.items()},
    }
    if (output / "config.json").exists():
        return _kept(output, identity if epochs is None else identity | {"epochs": epochs}).to(chosen_device(device))
    identity["epochs"] = epochs = epochs or max(2.0, config.stages.classifier_epochs)
    checkpoint.check_output(output)
    examples = data_for(judged, config)
    splits = encode_splits(examples, judged.preprocessor, config.data)
    networks = {"selector": config.predictor, "predictor": config.predictor, "seed": seed}
    judge = fresh_pair(config.model_copy(update=networks), judged.preprocessor, judged.labels)
    judge.to(chosen_device(device))
    judge.predictor.operator = judged.predictor.operator
    judge.policy = judge.policy.model_copy(update={"selectable": judged.policy.selectable})
    fit_judge(config, judge, splits["train"], epochs=epochs, observer=observer)
    calibrate_temperature(judge, splits["dev"])
    training = {"name": f"judge of {config.name}", "origins": [examples.origin], "judge": identity}
    checkpoint.save(judge, output, metrics={"dev": judge_figures(judge, splits["dev"])}, training=training)
    return judge


def judge_figures(judge: Rationalizer, split: Split, seed: int = 0) -> dict[str, float]:
    """How well a judge reads: ``accuracy`` on everything, ``accuracy_random_10`` and ``_50`` on random shares."""
    selectable = run_selector(judge, split).selectable
    draws = torch.rand(selectable.shape, generator=torch.Generator().manual_seed(seed))
    masks = {"": selectable, "_random_10": selectable & (draws < 0.1), "_random_50": selectable & (draws < 0.5)}
    logits = run_masks(judge, split, masks)
    return {f"accuracy{name}": accuracy(found, split.labels) for name, found in logits.items()}


def _kept(output: Path, identity: dict[str, Any]) -> Rationalizer:
    """The judge that lies at ``output``."""
    theirs = read_description(output).get("training", {}).get("judge")
    if theirs is None:
        raise CheckpointError(f"{output} is a checkpoint, but no judge; fix: give another directory for the judge")
    # a judge of an older version knows nothing of settings that came later: they had their defaults
    for name, section in (("predictor", BackboneConfig), ("optimisation", OptimisationConfig), ("data", DataConfig)):
        theirs[name] = section().model_dump(mode="json") | theirs.get(name, {})
    different = sorted(name for name in identity if identity[name] != theirs.get(name))
    if different:
        raise CheckpointError(f"{output} is the judge of another model or another training ({', '.join(different)} "
                              "differ); fix: give another directory, or delete it")  # fmt: skip
    return checkpoint.load(output)
