"""Who is told how training goes: a log file, TensorBoard, several at once; and who stops a run that has collapsed."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rekd_train.config.run import RunConfig
from rekd_train.errors import MissingExtraError, TrainingError
from rekd_train.files import RESUME, cannot_write, write_bytes


class Observer(Protocol):
    """Is told how training goes; a progress bar, a log, or nothing. What is not overridden is ignored."""

    def data(self, summary: dict[str, Any]) -> None:
        """Training is about to begin on these data: ``rekd_train.data.summarise``."""

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        """A stage of so many optimiser steps begins, or goes on after ``start`` of them."""

    def step(self, values: dict[str, float]) -> None:
        """A step ended; ``values`` is empty on most steps, since reading a loss waits for the device."""

    def evaluated(self, values: dict[str, float]) -> None:
        """The dev split was measured; ``values["best"]`` is 1 if no earlier state of the stage was better."""

    def note(self, text: str) -> None:
        """Something the user should know before training; no error."""


class Silent(Observer):
    """An observer that ignores everything."""


class Several(Observer):
    """Tells each of its observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)

    def data(self, summary: dict[str, Any]) -> None:
        for observer in self._observers:
            observer.data(summary)

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        for observer in self._observers:
            observer.stage(name, steps, start)

    def step(self, values: dict[str, float]) -> None:
        for observer in self._observers:
            observer.step(values)

    def evaluated(self, values: dict[str, float]) -> None:
        for observer in self._observers:
            observer.evaluated(values)

    def note(self, text: str) -> None:
        for observer in self._observers:
            observer.note(text)


class _Log(Observer):
    """Writes what has figures, with the stage and the step within it."""

    def __init__(self) -> None:
        self._name, self._step = "", 0

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
    """Appends one JSON object a line: event, stage, step, seconds since the epoch, figures.

    Args:
        path: of the file; what it holds stays, but for a line that a killed run or a full disk cut off.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
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


def readings(log: Path) -> dict[str, dict[str, list[float]]]:
    """What ``JsonLines`` wrote, by stage: ``step`` and, as long as it, each figure; dev's under ``<stage>.dev``.

    Of steps that a resumed run did again only the second reading counts.
    """
    curves: dict[str, dict[str, list[float]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        event, stage = entry.pop("event"), entry.pop("stage")
        if event == "stage":
            for curve in (curves.get(stage, {}), curves.get(f"{stage}.dev", {})):
                done = sum(step <= entry["step"] for step in curve.get("step", ()))
                for values in curve.values():
                    del values[done:]
        else:
            entry.pop("time")
            curve = curves.setdefault(stage if event == "step" else f"{stage}.dev", {})
            for name, value in entry.items():
                curve.setdefault(name, []).append(value)
    return curves


class TensorBoard(_Log):
    """Scalars named stage/figure, at the step within the stage.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tensorboard", "tensorboard") from None
        self._writer = SummaryWriter(str(directory))

    def _write(self, event: str, values: dict[str, Any]) -> None:
        place = f"{self._name}/dev" if event == "evaluation" else self._name
        if event != "stage":
            for name, value in values.items():
                self._writer.add_scalar(f"{place}/{name}", value, self._step)
            self._writer.flush()


class Watch:
    """Judges the figures of one stage each time they are read.

    Args:
        every: steps between readings.
        rates: earlier readings of the window, of a resumed stage.
    """

    def __init__(self, stage: str, config: RunConfig, every: int, rates: Iterable[float] = ()) -> None:
        self._stage = stage
        self._target = config.selection.target
        self._readings = max(1, config.stages.collapse_window // every)
        self._rates = deque(rates, maxlen=self._readings)

    @property
    def rates(self) -> list[float]:
        """Mean sampled rates of the window, oldest first."""
        return list(self._rates)

    @property
    def healthy(self) -> bool:
        """Whether the last reading gives no cause for concern."""
        return not self._rates or not (self._nothing(self._rates[-1]) or self._everything(self._rates[-1]))

    def judge(self, step: int, figures: dict[str, float]) -> None:
        """Look at a reading.

        Raises:
            TrainingError: a figure is not finite, or nothing or everything was kept for a whole window.
        """
        for name, value in sorted(figures.items(), key=lambda figure: figure[0] != "loss"):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self._stage}: diverged, {name} is {value} at step {step}; fix: a lower "
                    "optimisation.learning_rate or a smaller optimisation.gradient_clip"
                )
        if "rate" not in figures:
            return
        self._rates.append(figures["rate"])
        if len(self._rates) < self._readings:
            return
        if all(map(self._nothing, self._rates)):
            fix = (
                "a smaller selection.weight, a longer warm start (stages.classifier_epochs) or a lower "
                "optimisation.learning_rate"
            )
        elif all(map(self._everything, self._rates)):
            fix = "a larger selection.weight"
        else:
            return
        raise TrainingError(
            f"{self._stage}: collapsed, the selector keeps {figures['rate']:.2%} of the features at step {step} "
            f"(target {self._target:.2%}); fix: {fix}"
        )

    def _nothing(self, rate: float) -> bool:
        return rate < self._target / 20

    def _everything(self, rate: float) -> bool:
        return self._target <= 0.9 and rate > 1 - (1 - self._target) / 20
