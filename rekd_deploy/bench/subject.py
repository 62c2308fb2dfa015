"""What is examined: something that selects features and classifies from those it is told to keep. torch-free."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np

from rekd_deploy.bench.features import BATCH, Arrays, Features
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.parity.reference import handed_over
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.repository.runners import Exported
from rekd_train.inputs.policy import SelectionPolicy


class Subject(Protocol):
    """Two steps that can be run apart."""

    batch_size: int
    """Most examples at once."""

    def slots(self, width: int) -> int | None:
        """Most features that ``classify`` can be given of inputs with so many positions; None: any number."""

    def select(self, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, N) float32 and mask (B, N) bool."""

    def classify(self, inputs: Arrays, mask: np.ndarray) -> np.ndarray:
        """(B, C) logits from the features kept by (B, N) bool."""


class Selected(NamedTuple):
    """Rationales of many examples."""

    scores: np.ndarray
    """(n, N) float32."""
    mask: np.ndarray
    """(n, N) bool."""


class ServedGraphs:
    """The two graphs of a repository, or its engines, each run by itself in this process; a context manager.

    Args:
        root: model repository written by rekd-export.
        engine: the TensorRT engines in place of the graphs.
        threads: inside one operation; None: the cores that this process may use.

    Raises:
        RepositoryError: a file is missing, altered, or there is no engine.
    """

    def __init__(self, root: Path, *, engine: bool = False, threads: int | None = None) -> None:
        exported = Exported.of(root)
        self.manifest = read_manifest(root)
        self.description = exported.description
        self.policy = SelectionPolicy.model_validate(self.manifest["policy"])
        self.batch_size = BATCH
        roles = ("selector", "predictor")
        if engine:
            runners = [exported.engine_runner(role) for role in roles]
            self.batch_size = min(BATCH, *(exported.largest_batch(role) for role in roles))
        else:
            runners = [exported.graph_runner(role, threads=threads) for role in roles]
        self._selector, self._predictor = runners
        self._signature = exported.signature
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for runner in (self._selector, self._predictor):
                stack.enter_context(runner)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def slots(self, width: int) -> int | None:
        """Most features that ``classify`` can be given of inputs with so many positions; None: any number."""
        if self.manifest["operator"] != "compact":
            return None
        rule = self._signature.predictor.slots
        return int(self.manifest["capacity"]) if rule is None else rule.at(width)

    def select(self, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, N) float32 and mask (B, N) bool."""
        found = self._selector.run({spec.name: inputs[spec.name] for spec in self._signature.selector.inputs})
        return found["scores"], found["mask"]

    def classify(self, inputs: Arrays, mask: np.ndarray) -> np.ndarray:
        """(B, C) logits from the features kept by (B, N) bool."""
        known = inputs | handed_over(self._signature.predictor, mask)
        return self._predictor.run({spec.name: known[spec.name] for spec in self._signature.predictor.inputs})["logits"]


def selected(subject: Subject, features: Features, progress: Progress = silent, step: str = "selecting") -> Selected:
    """The rationales of all examples."""
    scores, mask = np.zeros(features.selectable.shape, np.float32), np.zeros(features.selectable.shape, bool)
    done = 0
    for rows, inputs in features.batches(subject.batch_size):
        found = subject.select(inputs)
        width = found[0].shape[1]
        scores[rows, :width], mask[rows, :width] = found
        done += len(rows)
        progress(step, done, len(features))
    return Selected(scores, mask)


def classified(
    subject: Subject, features: Features, mask: np.ndarray, progress: Progress = silent, step: str = "classifying"
) -> np.ndarray:
    """(n, C) logits of all examples on given rationales (n, N) bool."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    done = 0
    for rows, inputs in features.batches(subject.batch_size):
        width = _width(inputs, mask)
        parts.append((rows, subject.classify(inputs, mask[rows, :width])))
        done += len(rows)
        progress(step, done, len(features))
    logits = np.zeros((len(features), parts[0][1].shape[1]), np.float32)
    for rows, found in parts:
        logits[rows] = found
    return logits


def fitted(subject: Subject, features: Features, mask: np.ndarray) -> np.ndarray:
    """The mask with no more than the subject's slots take, in batches as ``classified`` makes them: the first ones."""
    found = mask.copy()
    for rows, inputs in features.batches(subject.batch_size):
        slots = subject.slots(_width(inputs, mask))
        if slots is not None:
            found[rows] &= mask[rows].cumsum(axis=1) <= slots
    return found


def _width(inputs: Arrays, mask: np.ndarray) -> int:
    """Positions of a batch."""
    return inputs["input_ids"].shape[1] if "input_ids" in inputs else mask.shape[1]
