"""Accuracy over rates: what the answers are worth when more or fewer of the best-scored features are kept.

A served predictor that computes on kept features alone has K slots and cannot be given more; the curve of what is
served ends there, and says so. Beyond that the checkpoint answers, where it is at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.features import Features
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.subject import ServedGraphs, Subject, classified, fitted, selected

if TYPE_CHECKING:
    from rekd_train.data import Split


def served_curve(
    root: Path, features: Features, labels: np.ndarray, engine: bool, progress: Progress = silent
) -> dict[str, Any]:
    """The curve of a repository's graphs; ``note`` says where it ends and why."""
    with ServedGraphs(root, engine=engine) as subject:
        return subject_curve(subject, features, labels, progress)


def subject_curve(
    subject: Subject, features: Features, labels: np.ndarray, progress: Progress = silent
) -> dict[str, Any]:
    """Rates, realised rates, accuracies and the area under them, of the rates that fit the subject's slots."""
    from rekd_train.evaluation.report import CURVE_RATES

    scores = selected(subject, features, progress, "scores").scores
    rates, realised, accuracies = [], [], []
    for rate in CURVE_RATES:
        mask = highest(scores, features.selectable, rate)
        if (fitted(subject, features, mask) != mask).any():
            break
        logits = classified(subject, features, mask, progress, f"at {rate:.0%}")
        rates.append(rate)
        realised.append(float(np.mean(mask.sum(axis=1) / np.maximum(features.counts, 1))))
        accuracies.append(float(np.mean(logits.argmax(axis=1) == labels)))
    whole = len(rates) == len(CURVE_RATES)
    note = "every rate" if whole else "the slots of the served predictor take no more"
    return {"rates": rates, "realised": realised, "accuracies": accuracies, "area": _area(rates, accuracies),
            "note": note}  # fmt: skip


def checkpoint_curve(path: Path, split: Split, progress: Progress = silent) -> dict[str, Any]:
    """The same from the checkpoint's own scores and predictor, at every rate, by PyTorch."""
    from rekd_train.checkpoints import checkpoint
    from rekd_train.evaluation.forward import fill, run_masks, run_selector
    from rekd_train.evaluation.report import CURVE_RATES

    pair = checkpoint.load(path)
    found = run_selector(pair, split)
    counts = found.selectable.sum(dim=1).clamp(min=1)
    realised, accuracies = [], []
    for done, rate in enumerate(CURVE_RATES, 1):
        mask = fill(found.scores, found.selectable, rate)
        logits = run_masks(pair, split, {"filled": mask})["filled"]
        realised.append(float((mask.sum(dim=1) / counts).mean()))
        accuracies.append(float(np.mean(logits.argmax(axis=1) == split.labels)))
        progress("the checkpoint's curve", done, len(CURVE_RATES))
    return {
        "rates": list(CURVE_RATES), "realised": realised, "accuracies": accuracies,
        "area": _area(list(CURVE_RATES), accuracies),
        "note": "by the checkpoint in PyTorch, not by what is served",
    }  # fmt: skip


def highest(scores: np.ndarray, selectable: np.ndarray, rate: float) -> np.ndarray:
    """The floor(rate * n) highest-scored features of each example, at least one: (n, N) bool.

    As the checkpoint's own curve decides (``fill``).
    """
    import torch

    from rekd_train.evaluation.forward import fill

    return fill(torch.from_numpy(scores), torch.from_numpy(selectable), rate).numpy()


def _area(rates: list[float], accuracies: list[float]) -> float | None:
    """Mean height over the range of the rates; None below two points."""
    from rekd_train.evaluation.metrics import area_under_curve

    return area_under_curve(rates, accuracies) if len(rates) > 1 else None
