"""What is examined: something that selects features and classifies from those it is told to keep. torch-free."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np

from rekd_deploy.bench.examples import BATCH, Features
from rekd_deploy.parity.reference import handed_over
from rekd_deploy.repository.reader import Exported, read_manifest
from rekd_deploy.runtimes.base import Arrays, RunnerChain
from rekd_train.inputs.policy import SelectionPolicy

if TYPE_CHECKING:
    from rekd_train.models.rationalizer import Rationalizer


class Subject(Protocol):
    """Two steps that can be run apart, on at most ``batch_size`` examples at once."""

    batch_size: int

    def slots(self, width: int) -> int | None:
        """Most features that ``classify`` can be given of inputs with N positions; None: any number."""

    def select(self, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Scores (B, N) float32 and mask (B, N) bool."""

    def classify(self, inputs: Arrays, mask: np.ndarray) -> np.ndarray:
        """(B, C) logits from the features kept by (B, N) bool."""


class ServedGraphs(ExitStack):
    """A ``Subject``: the graphs of a repository, or its TensorRT engines, run here one by one; a context manager.

    Raises:
        RepositoryError: a file is missing, altered, or there is no engine.
    """

    def __init__(self, root: Path, *, engine: bool = False) -> None:
        super().__init__()
        exported, roles = Exported.of(root), ("selector", "predictor")
        self.manifest = read_manifest(root)
        self.description = exported.description
        self.policy = SelectionPolicy.model_validate(self.manifest["policy"])
        self.batch_size = min(BATCH, *map(exported.largest_batch, roles)) if engine else BATCH
        self._runners = [exported.engine_runner(role) if engine else exported.graph_runner(role) for role in roles]
        self._predictor = exported.signature.predictor

    def __enter__(self) -> Self:
        self.enter_context(RunnerChain(self._runners))
        return self

    def slots(self, width: int) -> int | None:
        if self.manifest["operator"] != "compact":
            return None
        rule = self._predictor.slots
        return int(self.manifest["capacity"]) if rule is None else rule.at(width)

    def select(self, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        found = self._run(0, inputs)
        return found["scores"], found["mask"]

    def classify(self, inputs: Arrays, mask: np.ndarray) -> np.ndarray:
        return self._run(1, inputs | handed_over(self._predictor, mask))["logits"]

    def _run(self, step: int, known: Arrays) -> Arrays:
        runner = self._runners[step]
        return runner.run({spec.name: known[spec.name] for spec in runner.signature.inputs})


class TorchPair:
    """A ``Subject``: a pair in PyTorch, whose predictor takes any number of features."""

    batch_size = 128

    def __init__(self, pair: Rationalizer) -> None:
        self.pair = pair

    def slots(self, width: int) -> int | None:
        return None

    def select(self, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        found = self._run(self.pair.select, inputs)
        return found.scores.numpy(), found.mask.numpy()

    def classify(self, inputs: Arrays, mask: np.ndarray) -> np.ndarray:
        return self._run(self.pair.class_logits, inputs, mask).numpy()

    def _run(self, function: Callable[..., Any], inputs: Arrays, *more: np.ndarray) -> Any:
        import torch

        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            return function(tensors, *map(torch.from_numpy, more))


class Selected(NamedTuple):
    """Rationales of many examples."""

    scores: np.ndarray
    """(n, N) float32."""
    mask: np.ndarray
    """(n, N) bool."""


def selected(subject: Subject, features: Features) -> Selected:
    """The rationales of all examples."""
    found = Selected(np.zeros(features.selectable.shape, np.float32), np.zeros(features.selectable.shape, bool))
    for rows, inputs in features.batches(subject.batch_size):
        for whole, part in zip(found, subject.select(inputs), strict=True):
            whole[rows, : part.shape[1]] = part
    return found


def classified(subject: Subject, features: Features, mask: np.ndarray) -> np.ndarray:
    """(n, C) logits of all examples on given rationales (n, N) bool."""
    order, parts = [], []
    for rows, inputs in features.batches(subject.batch_size):
        parts.append(subject.classify(inputs, mask[rows, : _width(inputs, mask)]))
        order += rows.tolist()
    return np.concatenate(parts).astype(np.float32)[np.argsort(order)]


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

    @property
    def classes(self) -> np.ndarray:
        """(n,) predicted classes."""
        return self.logits.argmax(axis=1)

    def classes_of(self, features: Features, mask: np.ndarray) -> np.ndarray:
        """(n,) predicted classes of other content or rationales (n, N) bool."""
        return classified(self.subject, features, mask).argmax(axis=1)


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


def rate_curve(subject: Subject, features: Features, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy when the floor(rate * n) best-scored features are kept, for the rates that fit the subject's slots.

    A served predictor that computes on kept features alone has K slots and cannot be given more.

    Returns:
        ``rates``, ``realised``, ``accuracies``, ``area`` under them, and ``note``: where the curve ends and why.
    """
    import torch

    from rekd_train.evaluation.forward import fill
    from rekd_train.evaluation.metrics import area_under_curve
    from rekd_train.evaluation.report import CURVE_RATES

    scores = torch.from_numpy(selected(subject, features).scores)
    rates, realised, accuracies = [], [], []
    for rate in CURVE_RATES:
        mask = fill(scores, torch.from_numpy(features.selectable), rate).numpy()
        if (fitted(subject, features, mask) != mask).any():
            break
        predicted = classified(subject, features, mask).argmax(axis=1)
        rates.append(rate)
        realised.append(float(np.mean(mask.sum(axis=1) / np.maximum(features.counts, 1))))
        accuracies.append(float(np.mean(predicted == labels)))
    note = "every rate" if len(rates) == len(CURVE_RATES) else "the slots of the served predictor take no more"
    area = area_under_curve(rates, accuracies) if len(rates) > 1 else None
    return {"rates": rates, "realised": realised, "accuracies": accuracies, "area": area, "note": note}
