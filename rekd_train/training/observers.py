"""Who is told how training goes: log files, several at once; and who judges it: collapse, the best state."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekd_train.config.run import RunConfig
from rekd_train.errors import MissingExtraError, TrainingError
from rekd_train.files import RESUME, cannot_write, write_bytes


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


class Watch:
    """Judges the figures of one stage each time they are read: every ``every`` steps."""

    def __init__(self, stage: str, config: RunConfig, every: int) -> None:
        self._stage, self._target = stage, config.selection.target
        self._window = max(1, config.stages.collapse_window // every)
        self.selection_rates: list[float] = []
        """Mean sampled selection rates of the window, oldest first."""

    @property
    def healthy(self) -> bool:
        """Whether the last reading gives no cause for concern."""
        return not any(self._nothing(rate) or self._everything(rate) for rate in self.selection_rates[-1:])

    def judge(self, step: int, figures: dict[str, float]) -> None:
        """Raise TrainingError where a figure is not finite, or nothing or everything was kept for a whole window."""
        for name, value in sorted(figures.items(), key=lambda figure: figure[0] != "loss"):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self._stage}: diverged, {name} is {value} at step {step}; fix: a lower "
                    "optimisation.learning_rate or a smaller optimisation.gradient_clip"
                )
        if "selection_rate" not in figures:
            return
        rates = self.selection_rates = [*self.selection_rates, figures["selection_rate"]][-self._window :]
        if len(rates) < self._window:
            return
        if all(map(self._nothing, rates)):
            fix = (
                "a smaller selection.weight, a longer warm start (stages.classifier_epochs) or a lower "
                "optimisation.learning_rate"
            )
        elif all(map(self._everything, rates)):
            fix = "a larger selection.weight"
        else:
            return
        raise TrainingError(
            f"{self._stage}: collapsed, the selector keeps {rates[-1]:.2%} of the features at step {step} "
            f"(target {self._target:.2%}); fix: {fix}"
        )

    def _nothing(self, rate: float) -> bool:
        return rate < self._target / 20

    def _everything(self, rate: float) -> bool:
        return self._target <= 0.9 and rate > 1 - (1 - self._target) / 20


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
