"""Run a pair over a split and measure it, noise-free, by its stored policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rekd_train import metrics
from rekd_train.data import Split, bucketed_batches
from rekd_train.models.base import Inputs
from rekd_train.models.gates import selection_scores
from rekd_train.models.rationalizer import Rationalizer


@dataclass(frozen=True)
class SplitOutputs:
    """Outputs for every example of a split, in its order."""

    class_logits: np.ndarray
    """(n, C) float32."""
    kept: np.ndarray
    """(n,) kept features."""
    selectable: np.ndarray
    """(n,) selectable features."""


@dataclass(frozen=True)
class SelectorOutputs:
    """Selector scores of a split, padded to its longest example."""

    scores: Tensor
    """(n, N) float32."""
    selectable: Tensor
    """(n, N) bool."""


def to_tensors(inputs: dict[str, np.ndarray], device: torch.device) -> Inputs:
    """NumPy inputs as tensors on a device."""
    return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


@torch.inference_mode()
def run_split(rationalizer: Rationalizer, split: Split, batch_size: int = 128) -> SplitOutputs:
    """Select and classify every example."""
    rationalizer.eval()
    device = next(rationalizer.parameters()).device
    class_logits = np.zeros((len(split), len(rationalizer.labels)), dtype=np.float32)
    kept, selectable = np.zeros(len(split), dtype=np.int64), np.zeros(len(split), dtype=np.int64)
    for indices in bucketed_batches(split.lengths, batch_size):
        inputs = to_tensors(split.inputs(indices), device)
        selection = rationalizer.select(inputs)
        class_logits[indices] = _classify(rationalizer, inputs, selection.mask).cpu().numpy()
        kept[indices] = selection.mask.sum(dim=1).cpu().numpy()
        selectable[indices] = rationalizer.selectable(inputs).sum(dim=1).cpu().numpy()
    return SplitOutputs(class_logits, kept, selectable)


def _classify(rationalizer: Rationalizer, inputs: Inputs, mask: Tensor) -> Tensor:
    """As it is served: a compact predictor computes on the kept tokens alone."""
    if rationalizer.predictor.operator == "compact":
        return rationalizer.gathered_class_logits(inputs, mask)
    return rationalizer.class_logits(inputs, mask)


@torch.inference_mode()
def run_selector(rationalizer: Rationalizer, split: Split, batch_size: int = 128) -> SelectorOutputs:
    """Selector scores of every example, on the CPU."""
    rationalizer.eval()
    device = next(rationalizer.parameters()).device
    width = int(split.lengths.max())
    scores = torch.zeros(len(split), width)
    selectable = torch.zeros(len(split), width, dtype=torch.bool)
    for indices in bucketed_batches(split.lengths, batch_size):
        inputs = to_tensors(split.inputs(indices), device)
        logits = rationalizer.selector_logits(inputs)
        rows = torch.from_numpy(indices)
        scores[rows, : logits.shape[1]] = selection_scores(logits).cpu()
        selectable[rows, : logits.shape[1]] = rationalizer.selectable(inputs).cpu()
    return SelectorOutputs(scores, selectable)


def measure(rationalizer: Rationalizer, split: Split) -> dict[str, float]:
    """Accuracy given the rationale, calibration and realised rate on a split."""
    outputs = run_split(rationalizer, split)
    probabilities = rationalizer.probabilities(torch.from_numpy(outputs.class_logits)).numpy()
    return {
        "examples": len(split),
        "accuracy": metrics.accuracy(probabilities, split.labels),
        "nll": metrics.negative_log_likelihood(probabilities, split.labels),
        "ece": metrics.expected_calibration_error(probabilities, split.labels),
        **metrics.rate_summary(outputs.kept, outputs.selectable),
    }
