"""Who is told how training goes: nothing, a log file, TensorBoard, several at once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rekd_train.errors import MissingExtraError, TrainingError
from rekd_train.files import RESUME, cannot_write, write_bytes


class Observer(Protocol):
    """Is told how training goes; a progress bar, a log, or nothing."""

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


class Silent:
    """An observer that ignores everything."""

    def data(self, summary: dict[str, Any]) -> None:
        pass

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        pass

    def step(self, values: dict[str, float]) -> None:
        pass

    def evaluated(self, values: dict[str, float]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Several:
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


class _Counting:
    """Knows the stage and the step within it."""

    def __init__(self) -> None:
        self._name, self._step = "", 0

    def data(self, summary: dict[str, Any]) -> None:
        pass

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._name, self._step = name, start
        self._write("stage", {"steps": steps})

    def step(self, values: dict[str, float]) -> None:
        self._step += 1
        if values:
            self._write("step", values)

    def evaluated(self, values: dict[str, float]) -> None:
        self._write("evaluation", values)

    def note(self, text: str) -> None:
        pass  # no figure

    def _write(self, event: str, values: dict[str, Any]) -> None:
        raise NotImplementedError


class JsonLines(_Counting):
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


class TensorBoard(_Counting):
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
