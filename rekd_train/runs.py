"""A whole run: configuration in, checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rekd_train import checkpoint
from rekd_train.building import fresh_pair, preprocessor_for, weight_origins
from rekd_train.checkpoint_examples import checkpoint_examples
from rekd_train.checks import check_teacher
from rekd_train.config import RunConfig
from rekd_train.data import DataSet, encode, encode_splits, load_data
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.evaluation import measure
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.observers import JsonLines, Observer, Several, Silent, TensorBoard
from rekd_train.report import evaluate
from rekd_train.runtime import Runtime, chosen_device
from rekd_train.state import StateStore, cannot_write, identity_of
from rekd_train.training import calibrate_pair, compact_pair, fit


def train_run(
    config: RunConfig,
    output: Path,
    *,
    teacher: Path | None = None,
    warm_start: Path | None = None,
    observer: Observer | None = None,
    resume: bool = False,
    device: str = "auto",
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train by a configuration and write the checkpoint; several processes share the work.

    Beside the output, in ``<output>.training``, lie the log and, until the checkpoint is written, the state
    from which an interrupted run goes on.

    Args:
        teacher: checkpoint to distil from.
        warm_start: checkpoint whose predictor and selector are the start; the warm starts are left out.
        resume: go on from the stored state, if there is one.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        tensorboard: also write a log for TensorBoard.

    Returns:
        The metrics that are also in the checkpoint's metrics.json; nothing in processes but the main one.
    """
    checkpoint.check_output(output)
    runtime = Runtime(device)
    teacher_pair = checkpoint.load(teacher) if teacher is not None else None
    data = load_data(config.data)
    preprocessor = preprocessor_for(config)
    pair = fresh_pair(config, preprocessor, data.label_names)
    if teacher_pair is not None:
        check_teacher(teacher_pair, pair, config)
    if warm_start is not None:
        _start_from(pair, checkpoint.load(warm_start), warm_start)
    splits = encode_splits(data, preprocessor, config.data)
    start = {"teacher": teacher, "warm_start": warm_start}
    hashes = {name: checkpoint.checkpoint_hash(path) if path else None for name, path in start.items()}
    store = StateStore(training_directory(output), identity_of(config, splits["train"], splits["dev"], **hashes))
    fit(
        config, pair, splits["train"], splits["dev"], teacher=teacher_pair, warm=warm_start is not None,
        observer=_logs(runtime, store, observer, resume, tensorboard), runtime=runtime, store=store, resume=resume,
    )  # fmt: skip
    metrics = {}
    if runtime.is_main:
        metrics = {name: measure(pair, splits[name]) for name in ("dev", "test")}
        _save(pair, output, config, data, metrics)
        store.discard()
    runtime.wait()
    runtime.close()
    return metrics


def training_directory(output: Path) -> Path:
    """Where a run that writes ``output`` keeps its log and its state."""
    return output.with_name(f"{output.name}.training")


def _logs(
    runtime: Runtime, store: StateStore, observer: Observer | None, resume: bool, tensorboard: bool
) -> Observer:
    if not runtime.is_main:
        return Silent()
    log = store.path.with_name("log.jsonl")
    if not (resume and store.path.exists()):
        log.unlink(missing_ok=True)
    observers = [JsonLines(log)]
    if tensorboard:
        observers.append(TensorBoard(log.parent))
    return Several([*observers, observer] if observer else observers)


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


def calibrate_run(path: Path, output: Path, target: float | None = None, device: str = "auto") -> dict[str, Any]:
    """Fit bias and temperature again, for another target rate if given."""
    checkpoint.check_output(output)
    pair, config, data, splits = _reopen(path, device)
    if target is not None:
        selection = config.selection.model_dump() | {"target": target}
        if selection["budget"] is not None:
            selection["budget"] = max(selection["budget"], target)
        config = RunConfig.model_validate(config.model_dump() | {"selection": selection})
    calibrate_pair(config, pair, splits["dev"])
    return _finish(pair, output, config, data, splits)


def compact_run(
    path: Path, output: Path, *, teacher: Path | None = None, observer: Observer | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Fine-tune a checkpoint's predictor on gathered tokens, selector frozen."""
    checkpoint.check_output(output)
    pair, config, data, splits = _reopen(path, device)
    teacher_pair = checkpoint.load(teacher) if teacher is not None else None
    compact_pair(config, pair, splits["train"], splits["dev"], teacher=teacher_pair, observer=observer)
    return _finish(pair, output, config, data, splits)


def _reopen(path: Path, device: str):
    pair, config = checkpoint.load(path).to(chosen_device(device)), _config_of(path)
    data = load_data(config.data)
    return pair, config, data, encode_splits(data, pair.preprocessor, config.data)


def _finish(pair: Rationalizer, output: Path, config: RunConfig, data: DataSet, splits) -> dict[str, Any]:
    metrics = {name: measure(pair, splits[name]) for name in ("dev", "test")}
    _save(pair, output, config, data, metrics)
    return metrics


def _save(pair: Rationalizer, output: Path, config: RunConfig, data: DataSet, metrics: dict[str, Any]) -> None:
    try:
        checkpoint.save(
            pair,
            output,
            metrics=metrics,
            training={
                "name": config.name, "config": config.model_dump(), "origins": [data.origin, *weight_origins(config)],
            },
            **checkpoint_examples(data, pair.preprocessor),
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise CheckpointError(cannot_write(output, error)) from error


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
