"""A whole run: configuration in, checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rekd_train import checkpoint
from rekd_train.building import fresh_pair, preprocessor_for, weight_origins
from rekd_train.checkpoint_examples import checkpoint_examples
from rekd_train.config import RunConfig
from rekd_train.data import DataSet, encode, encode_splits, load_data
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.evaluation import measure
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.report import evaluate
from rekd_train.training import Observer, calibrate_policy, compact_pair, fit


def train_run(
    config: RunConfig,
    output: Path,
    *,
    teacher: Path | None = None,
    warm_start: Path | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Train by a configuration and write the checkpoint.

    Args:
        teacher: checkpoint to distil from.
        warm_start: checkpoint whose predictor (and selector, where the sizes agree) is the start; the
            classifier stage is left out.

    Returns:
        The metrics that are also in the checkpoint's metrics.json.
    """
    checkpoint.check_output(output)
    teacher_pair = checkpoint.load(teacher) if teacher is not None else None
    data = load_data(config.data)
    preprocessor = preprocessor_for(config)
    if teacher_pair is not None and teacher_pair.preprocessor.fingerprint != preprocessor.fingerprint:
        raise ConfigError(
            f"the teacher {teacher} reads its inputs otherwise (another tokenizer, length limit or patch grid); "
            "distillation needs the same features"
        )
    pair = fresh_pair(config, preprocessor, data.label_names)
    if warm_start is not None:
        _start_from(pair, checkpoint.load(warm_start), warm_start)
    splits = encode_splits(data, preprocessor, config.data)
    fit(
        config, pair, splits["train"], splits["dev"],
        teacher=teacher_pair, warm=warm_start is not None, observer=observer,
    )  # fmt: skip
    metrics = {name: measure(pair, splits[name]) for name in ("dev", "test")}
    _save(pair, output, config, data, metrics)
    return metrics


def evaluate_run(
    path: Path,
    split: str = "test",
    *,
    draws: int = 10,
    teacher: Path | None = None,
    risk: float = 0.05,
    device: str = "auto",
) -> dict[str, Any]:
    """The full report of a checkpoint on a split of the data it was trained on; see ``rekd_train.report``."""
    pair, config = checkpoint.load(path), _config_of(path)
    teacher_pair = checkpoint.load(teacher) if teacher is not None else None
    for model in (pair, teacher_pair):
        if model is not None:
            model.to(chosen_device(device))
    data = load_data(config.data)
    splits = {name: encode(data.splits[name], pair.preprocessor) for name in {split, "dev"}}
    report = evaluate(pair, splits, split=split, draws=draws, teacher=teacher_pair, risk=risk)
    return {"checkpoint": str(path), "data": data.origin, **report}


def calibrate_run(path: Path, output: Path, target: float | None = None) -> dict[str, Any]:
    """Fit bias and temperature again, for another target rate if given."""
    checkpoint.check_output(output)
    pair, config, data, splits = _reopen(path)
    if target is not None:
        selection = config.selection.model_dump() | {"target": target}
        selection["budget"] = max(selection["budget"], target)
        config = RunConfig.model_validate(config.model_dump() | {"selection": selection})
    calibrate_policy(config, pair, splits["dev"])
    return _finish(pair, output, config, data, splits)


def compact_run(
    path: Path,
    output: Path,
    *,
    teacher: Path | None = None,
    epochs: float | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Fine-tune a checkpoint's predictor on gathered tokens, selector frozen.

    Args:
        epochs: how long; None: as the checkpoint's own configuration says.
    """
    checkpoint.check_output(output)
    pair, config, data, splits = _reopen(path)
    if epochs is not None:
        config = config.model_copy(update={"stages": config.stages.model_copy(update={"compact_epochs": epochs})})
    teacher_pair = checkpoint.load(teacher) if teacher is not None else None
    compact_pair(config, pair, splits["train"], splits["dev"], teacher=teacher_pair, observer=observer)
    return _finish(pair, output, config, data, splits)


def chosen_device(name: str) -> torch.device:
    """'cpu', 'cuda' or another of torch's names; 'auto': the GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"there is no device '{name}' here; fix: --device cpu") from None
    return device


def _reopen(path: Path):
    pair, config = checkpoint.load(path), _config_of(path)
    data = load_data(config.data)
    return pair, config, data, encode_splits(data, pair.preprocessor, config.data)


def _finish(pair: Rationalizer, output: Path, config: RunConfig, data: DataSet, splits) -> dict[str, Any]:
    metrics = {name: measure(pair, splits[name]) for name in ("dev", "test")}
    _save(pair, output, config, data, metrics)
    return metrics


def _save(pair: Rationalizer, output: Path, config: RunConfig, data: DataSet, metrics: dict[str, Any]) -> None:
    checkpoint.save(
        pair,
        output,
        metrics=metrics,
        training={
            "name": config.name, "config": config.model_dump(), "origins": [data.origin, *weight_origins(config)],
        },
        **checkpoint_examples(data, pair.preprocessor),
    )  # fmt: skip


def _config_of(path: Path) -> RunConfig:
    training = checkpoint.read_description(path)["training"]
    if "config" not in training:
        raise CheckpointError(f"{path} does not record the run it comes from, so its data set is unknown")
    return RunConfig.model_validate(training["config"])


def _start_from(pair: Rationalizer, start: Rationalizer, path: Path) -> None:
    for role in ("selector", "predictor"):
        mine, theirs = getattr(pair, role), getattr(start, role)
        if mine.backbone.settings.model_dump() != theirs.backbone.settings.model_dump():
            raise ConfigError(f"the {role} of {path} has other sizes than this run's; warm starts need the same")
        mine.load_state_dict(theirs.state_dict())
