"""What is examined: something that selects features and classifies from those it is told to keep. torch-free.

A served predictor that computes on kept features alone has K slots and cannot be given more; the curve of accuracy over
rates of what is served ends there, and says so. Beyond that the checkpoint predicts, where it is at hand.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np

from rekd_deploy.bench.examples import BATCH, Features
from rekd_deploy.bench.results import Progress, silent
from rekd_deploy.parity.reference import handed_over
from rekd_deploy.repository.reader import Exported, read_manifest
from rekd_deploy.runtimes.base import Arrays
from rekd_train.inputs.policy import SelectionPolicy

if TYPE_CHECKING:
    from rekd_train.data import Split


class Subject(Protocol):
    """Two steps that can be run apart, on at most ``batch_size`` examples at once."""

    batch_size: int

    def slots(self, width: int) -> int | None:
        """Most features that ``classify`` can be given of inputs with so many positions; None: any number."""

    def select(self, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, N) float32 and mask (B, N) bool."""

    def classify(self, inputs: Arrays, mask: np.ndarray) -> np.ndarray:
        """(B, C) logits from the features kept by (B, N) bool."""


class ServedGraphs:
    """A ``Subject``: the two graphs of a repository, or its engines, run here one by one; a context manager.

    Args:
        engine: the TensorRT engines in place of the graphs.

    Raises:
        RepositoryError: a file is missing, altered, or there is no engine.
    """

    def __init__(self, root: Path, *, engine: bool = False) -> None:
        exported, roles = Exported.of(root), ("selector", "predictor")
        self.manifest = read_manifest(root)
        self.description = exported.description
        self.policy = SelectionPolicy.model_validate(self.manifest["policy"])
        self.batch_size = min(BATCH, *map(exported.largest_batch, roles)) if engine else BATCH
        self._runners = [exported.engine_runner(role) if engine else exported.graph_runner(role) for role in roles]
        self._signature = exported.signature
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for runner in self._runners:
                stack.enter_context(runner)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def slots(self, width: int) -> int | None:
        if self.manifest["operator"] != "compact":
            return None
        rule = self._signature.predictor.slots
        return int(self.manifest["capacity"]) if rule is None else rule.at(width)

    def select(self, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        found = self._runners[0].run({spec.name: inputs[spec.name] for spec in self._signature.selector.inputs})
        return found["scores"], found["mask"]

    def classify(self, inputs: Arrays, mask: np.ndarray) -> np.ndarray:
        known, predictor = inputs | handed_over(self._signature.predictor, mask), self._signature.predictor
        return self._runners[1].run({spec.name: known[spec.name] for spec in predictor.inputs})["logits"]


class Selected(NamedTuple):
    """Rationales of many examples: scores (n, N) float32, mask (n, N) bool."""

    scores: np.ndarray
    mask: np.ndarray


def selected(subject: Subject, features: Features, progress: Progress = silent, step: str = "selecting") -> Selected:
    """The rationales of all examples."""
    scores, mask = np.zeros(features.selectable.shape, np.float32), np.zeros(features.selectable.shape, bool)
    done = 0
    for rows, inputs in features.batches(subject.batch_size):
        found = subject.select(inputs)
        scores[rows, : found[0].shape[1]], mask[rows, : found[0].shape[1]] = found
        done += len(rows)
        progress(step, done, len(features))
    return Selected(scores, mask)


def classified(
    subject: Subject, features: Features, mask: np.ndarray, progress: Progress = silent, step: str = "classifying"
) -> np.ndarray:
    """(n, C) logits of all examples on given rationales (n, N) bool."""
    order, parts = [], []
    for rows, inputs in features.batches(subject.batch_size):
        parts.append(subject.classify(inputs, mask[rows, : _width(inputs, mask)]))
        order.append(rows)
        progress(step, sum(map(len, order)), len(features))
    return np.concatenate(parts).astype(np.float32)[np.argsort(np.concatenate(order))]


@dataclass(frozen=True)
class Exam:
    """A subject, examples, and what it made of them."""

    subject: Subject
    features: Features
    chosen: Selected
    logits: np.ndarray
    """(n, C), from its own rationales."""
    labels: np.ndarray
    """(n,) int."""
    seed: int = 0
    """Of donors, random masks and folds."""
    progress: Progress = silent

    @property
    def classes(self) -> np.ndarray:
        """(n,) predicted classes."""
        return self.logits.argmax(axis=1)

    def classes_of(self, features: Features, mask: np.ndarray, step: str) -> np.ndarray:
        """(n,) predicted classes of other content or rationales (n, N) bool."""
        return classified(self.subject, features, mask, self.progress, step).argmax(axis=1)


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


# accuracy over rates


def subject_curve(
    subject: Subject, features: Features, labels: np.ndarray, progress: Progress = silent
) -> dict[str, Any]:
    """Accuracy when the floor(rate * n) best-scored features are kept, for the rates that fit the subject's slots.

    Returns:
        ``rates``, ``realised``, ``accuracies``, ``area`` under them, and ``note``: where the curve ends and why.
    """
    import torch

    from rekd_train.evaluation.forward import fill
    from rekd_train.evaluation.report import CURVE_RATES

    scores = torch.from_numpy(selected(subject, features, progress, "scores").scores)
    points = []
    for rate in CURVE_RATES:
        mask = fill(scores, torch.from_numpy(features.selectable), rate).numpy()
        if (fitted(subject, features, mask) != mask).any():
            break
        predicted = classified(subject, features, mask, progress, f"at {rate:.0%}").argmax(axis=1)
        points.append((rate, mask, predicted))
    note = "every rate" if len(points) == len(CURVE_RATES) else "the slots of the served predictor take no more"
    return _curve(points, features.counts, labels, note)


def checkpoint_curve(path: Path, split: Split, progress: Progress = silent) -> dict[str, Any]:
    """The same from the checkpoint's own scores and predictor, at every rate, by PyTorch."""
    from rekd_train.checkpoints import checkpoint
    from rekd_train.evaluation.forward import fill, run_masks, run_selector
    from rekd_train.evaluation.report import CURVE_RATES

    pair = checkpoint.load(path)
    found, points = run_selector(pair, split), []
    for done, rate in enumerate(CURVE_RATES, 1):
        mask = fill(found.scores, found.selectable, rate)
        points.append((rate, mask.numpy(), run_masks(pair, split, {"filled": mask})["filled"].argmax(axis=1)))
        progress("the checkpoint's curve", done, len(CURVE_RATES))
    counts = found.selectable.sum(dim=1).numpy()
    return _curve(points, counts, split.labels, "by the checkpoint in PyTorch, not by what is served")


def _curve(
    points: list[tuple[float, np.ndarray, np.ndarray]], counts: np.ndarray, labels: np.ndarray, note: str
) -> dict[str, Any]:
    """Of (rate, mask, predicted classes)."""
    from rekd_train.evaluation.metrics import area_under_curve

    rates = [rate for rate, _, _ in points]
    realised = [float(np.mean(mask.sum(axis=1) / np.maximum(counts, 1))) for _, mask, _ in points]
    accuracies = [float(np.mean(predicted == labels)) for _, _, predicted in points]
    area = area_under_curve(rates, accuracies) if len(rates) > 1 else None
    return {"rates": rates, "realised": realised, "accuracies": accuracies, "area": area, "note": note}
