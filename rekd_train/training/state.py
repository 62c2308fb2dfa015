"""What a run writes while it goes on: its state, from which it goes on exactly if it is cut off, and its logs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from rekd_train.config.run import RunConfig, upgraded
from rekd_train.data import Split
from rekd_train.errors import ConfigError, MissingExtraError, TrainingError
from rekd_train.files import RESUME, cannot_write, write_bytes
from rekd_train.models.rationalizer import Rationalizer

FILE = "state.pt"
LOG = "log.jsonl"
VERSION = 2  # 2: the optimiser's groups are others
_ANEW = "--overwrite instead of --resume, to begin anew"
_HASHED_AT_ONCE = 512  # examples that are read together to recognise the data again

ADJUSTABLE = {
    "optimisation.learning_rate", "optimisation.embedding_learning_rate", "optimisation.selector_learning_rate",
    "optimisation.head_learning_rate", "optimisation.gradient_clip", "selection.weight", "stages.patience",
    "stages.save_every", "stages.collapse_window",
}  # fmt: skip
"""Settings that may change when a run goes on: what the advice after a divergence or a collapse names."""


class Best:
    """The best state of a stage so far; its attributes are what a saved state holds of it.

    Args:
        metric: 'accuracy' or 'macro_f1' (highest; of equals the one of least L_RE) or 'extraction_loss' (least, the
            later of equals; with rationales rounded to three decimals, without them as it is, as in the authors' code).
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.value: tuple[float, float] | None = None
        """What is compared; higher is better."""
        self.step = 0
        self.since = 0
        """Evaluations without improvement."""
        self.weights: dict[str, Any] = {}

    def offer(self, step: int, figures: dict[str, float], weights: dict[str, Any]) -> bool:
        """Consider a state; True if it is the best. Its tensors are copied to the CPU."""
        extraction = figures["extraction_loss"]
        if self.metric == "extraction_loss":
            value = (-round(extraction, 3) if "selection_rate" in figures else -extraction, float(step))
        else:
            value = (figures[self.metric], -extraction)
        better = math.isfinite(extraction) and (self.value is None or value > self.value)
        if better:
            self.value, self.step, self.since = value, step, 0
            self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
        else:
            self.since += 1
        return better


@dataclass
class Snapshot:
    """Everything a run needs to go on: noise, order and dropout follow from the seed and the step."""

    stage: int = 0
    step: int = 0  # steps of the stage that are done
    pair: dict[str, torch.Tensor] = field(default_factory=dict)
    operator: str = "zero"
    policy: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, torch.Tensor] = field(default_factory=dict)  # shares memory with ``pair`` but for a head
    optimiser: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)  # the best state so far, the selection rates read last


class StateStore:
    """One file that is replaced whole; ``identity``: what a run must agree in to go on from it."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self.path, self.log = directory / FILE, directory / LOG
        self._identity = identity

    def save(self, snapshot: Snapshot) -> None:
        """Replace the state; TrainingError where the disk is full or not writable: the previous state is intact."""
        work = self.path.with_name(f".{FILE}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(work, "wb") as file:
                # dataclasses.asdict would copy every tensor
                torch.save({"version": VERSION, "identity": self._identity, "snapshot": dict(vars(snapshot))}, file)
                file.flush()
                os.fsync(file.fileno())
            work.replace(self.path)
        except (OSError, RuntimeError) as error:
            raise TrainingError(cannot_write(self.path, error, RESUME)) from error
        finally:
            work.unlink(missing_ok=True)

    def load(self) -> Snapshot | None:
        """The state, None if there is none; ConfigError if it is another run's, TrainingError if it is damaged."""
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            identity, snapshot = content["identity"], Snapshot(**content["snapshot"])
            identity["config"] = upgraded(identity["config"])
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, UnpicklingError) as error:
            problem = " ".join(str(error).split())[:200]
            raise TrainingError(f"{self.path} cannot be read ({problem}); fix: {_ANEW}") from None
        if content["version"] != VERSION:
            raise TrainingError(f"{self.path} is of another version of rekd; fix: {_ANEW}")
        changed = sorted(set(_differences(identity, self._identity)) - {f"config.{key}" for key in ADJUSTABLE})
        if changed:
            raise ConfigError(f"{self.path} is the state of another run: {', '.join(changed)} differ; "
                              f"fix: the same settings, or {_ANEW}")  # fmt: skip
        return snapshot

    def discard(self) -> None:
        """Remove the state of a finished run, and what kills during a save have left half written."""
        for path in (self.path, *self.path.parent.glob(f".{FILE}.*")):
            path.unlink(missing_ok=True)


def training_directory(output: Path) -> Path:
    """Where a run that writes ``output`` keeps its log and its state."""
    return output.with_name(f"{output.name}.training")


def check_start(output: Path, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError if a run would lose another one's state or log unasked, or has nothing to resume."""
    directory = training_directory(output)
    state, log = directory / FILE, directory / LOG
    if resume and not state.exists():
        anew = _ANEW if log.exists() else "the same command without --resume"
        raise ConfigError(f"nothing to resume: {state} does not exist; fix: {anew}")
    asked = resume or overwrite
    if state.exists() and not asked:
        begun = "holds an interrupted run; fix: --resume to go on with it, --overwrite to begin anew"
        raise ConfigError(f"{directory} {begun}")
    if log.exists() and not asked:
        earlier = "is the log of an earlier run; fix: another output directory, or --overwrite to replace it"
        raise ConfigError(f"{log} {earlier}")


def identity_of(config: RunConfig, train: Split, dev: Split, **more: Any) -> dict[str, Any]:
    """What makes a run this run and no other, as JSON values."""
    digest = hashlib.sha256()
    for split in (train, dev):
        digest.update(split.labels.tobytes())
        digest.update(split.lengths.tobytes())
        for start in range(0, len(split), _HASHED_AT_ONCE):
            inputs = split.inputs(np.arange(start, min(start + _HASHED_AT_ONCE, len(split))))
            for name in sorted(inputs):
                digest.update(np.ascontiguousarray(inputs[name]))
    return {"config": config.model_dump(mode="json"), "data": digest.hexdigest(), **more}


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found for name in sorted(set(one) | set(other))
            for found in _differences(one.get(name), other.get(name), f"{path}.{name}" if path else name)
        ]  # fmt: skip
    return [] if one == other else [path]


def pair_state(pair: Rationalizer) -> dict:
    """A pair's part of a snapshot."""
    return {"pair": pair.state_dict(), "operator": pair.predictor.operator, "policy": pair.policy.model_dump()}


def load_pair_state(pair: Rationalizer, snapshot: Snapshot) -> None:
    """The counterpart of ``pair_state``, in place."""
    pair.load_state_dict(snapshot.pair)
    pair.predictor.operator = snapshot.operator
    pair.policy = type(pair.policy).model_validate(snapshot.policy)


# logs


class Observer:
    """Is told how training goes; a progress bar, a log, or nothing. What is not overridden is ignored."""

    def data(self, summary: dict[str, Any]) -> None:
        """Training is about to begin on these data: ``rekd_train.data.summarise``."""

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        """A stage of ``steps`` optimiser steps begins, or goes on after ``start`` of them."""

    def step(self, values: dict[str, float]) -> None:
        """A step ended; ``values`` is empty on most steps, since reading a loss waits for the device."""

    def evaluated(self, values: dict[str, float]) -> None:
        """The dev split was measured; ``values["best"]`` is 1 if no earlier state of the stage was better."""

    def note(self, text: str) -> None:
        """Something the user should know before training; no error."""


class Several(Observer):
    """Tells each of its observers of the training itself."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        for observer in self._observers:
            observer.stage(name, steps, start)

    def step(self, values: dict[str, float]) -> None:
        for observer in self._observers:
            observer.step(values)

    def evaluated(self, values: dict[str, float]) -> None:
        for observer in self._observers:
            observer.evaluated(values)


class _Log(Observer):
    """Writes what has figures, with the stage and the step within it."""

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._name, self._step = name, start
        self._write("stage", {"steps": steps})

    def step(self, values: dict[str, float]) -> None:
        self._step += 1
        if values:
            self._write("step", values)

    def evaluated(self, values: dict[str, float]) -> None:
        self._write("evaluation", values)

    def _write(self, event: str, values: dict[str, Any]) -> None:
        raise NotImplementedError


class JsonLines(_Log):
    """Appends one JSON object a line: event, stage, step, time, figures; a line that was cut off is removed first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            write_bytes(path, content[:whole])

    def _write(self, event: str, values: dict[str, Any]) -> None:
        line = {"event": event, "stage": self._name, "step": self._step, "time": round(time.time(), 3), **values}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingError(cannot_write(self._path, error, RESUME)) from error


class TensorBoard(_Log):
    """Scalars named stage/figure, at the step within the stage; MissingExtraError without tensorboard."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "tensorboard") from None
        self._writer = SummaryWriter(str(directory))

    def _write(self, event: str, values: dict[str, Any]) -> None:
        if event != "stage":
            group = f"{self._name}/dev" if event == "evaluation" else self._name
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, self._step)
            self._writer.flush()
