"""Run a pair over a split and measure it, as it is served: noise-free, a compact predictor on gathered features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rekd_train.data import Split, bucketed_batches
from rekd_train.evaluation import calibration_metrics, metrics
from rekd_train.inputs.preprocessors import full_length
from rekd_train.models.base import Inputs
from rekd_train.models.gates import kept_positions, selection_scores
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
        inputs = _inputs(rationalizer, split, indices, device)
        selection = rationalizer.select(inputs)
        class_logits[indices] = _classify(rationalizer, inputs, selection.mask).cpu().numpy()
        kept[indices] = selection.mask.sum(dim=1).cpu().numpy()
        selectable[indices] = rationalizer.selectable(inputs).sum(dim=1).cpu().numpy()
    return SplitOutputs(class_logits, kept, selectable)


@torch.inference_mode()
def run_selector(rationalizer: Rationalizer, split: Split, batch_size: int = 128) -> SelectorOutputs:
    """Selector scores of every example, on the CPU."""
    rationalizer.eval()
    device = next(rationalizer.parameters()).device
    everywhere = rationalizer.policy.selectable == "all"
    width = rationalizer.preprocessor.positions if everywhere else int(split.lengths.max())
    scores = torch.zeros(len(split), width)
    selectable = torch.zeros(len(split), width, dtype=torch.bool)
    for indices in bucketed_batches(split.lengths, batch_size):
        inputs = _inputs(rationalizer, split, indices, device)
        logits = rationalizer.selector_logits(inputs)
        rows = torch.from_numpy(indices)
        scores[rows, : logits.shape[1]] = selection_scores(logits).cpu()
        selectable[rows, : logits.shape[1]] = rationalizer.selectable(inputs).cpu()
    return SelectorOutputs(scores, selectable)


@torch.inference_mode()
def run_masks(
    rationalizer: Rationalizer, split: Split, masks: Mapping[str, Tensor], batch_size: int = 128
) -> dict[str, np.ndarray]:
    """What the predictor answers to given rationales, whatever their size; inputs are moved once for all of them.

    Args:
        masks: by name, (n, N) bool on the CPU.

    Returns:
        By the same names, (n, C) float32 logits.
    """
    rationalizer.eval()
    device = next(rationalizer.parameters()).device
    class_logits = {name: np.zeros((len(split), len(rationalizer.labels)), dtype=np.float32) for name in masks}
    for indices in bucketed_batches(split.lengths, batch_size):
        inputs = _inputs(rationalizer, split, indices, device)
        width = rationalizer.selectable(inputs).shape[1]
        rows = torch.from_numpy(indices)
        for name, mask in masks.items():
            part = mask[rows, :width]
            slots = max(1, int(part.sum(dim=1).max()))
            class_logits[name][indices] = _classify(rationalizer, inputs, part.to(device), slots).cpu().numpy()
    return class_logits


def measure(rationalizer: Rationalizer, split: Split) -> dict[str, Any]:
    """Accuracy given the rationale, calibration and realised rate on a split: one pass, no more.

    ``never_predicted`` lists the classes of the split that are predicted for no example.
    """
    outputs = run_split(rationalizer, split)
    figures = measure_outputs(rationalizer, outputs, split.labels)
    predicted = outputs.class_logits.argmax(axis=1)
    return figures | {"never_predicted": metrics.never_predicted(predicted, split.labels, rationalizer.labels)}


def evaluate_with_masks(rationalizer: Rationalizer, split: Split, mask: Tensor, selectable: Tensor) -> dict[str, float]:
    """As ``measure``, with rationales from elsewhere (random ones, the first words) instead of the selector's.

    Args:
        mask: (n, N) bool on the CPU.
        selectable: (n, N) bool on the CPU, as ``run_selector`` returns it.
    """
    class_logits = run_masks(rationalizer, split, {"given": mask})["given"]
    outputs = SplitOutputs(class_logits, mask.sum(dim=1).numpy(), selectable.sum(dim=1).numpy())
    return measure_outputs(rationalizer, outputs, split.labels)


def measure_outputs(rationalizer: Rationalizer, outputs: SplitOutputs, labels: np.ndarray) -> dict[str, float]:
    """The figures of ``measure`` from outputs that are there already."""
    probabilities = rationalizer.probabilities(torch.from_numpy(outputs.class_logits)).numpy()
    return {
        "examples": len(labels),
        "accuracy": metrics.accuracy(probabilities, labels),
        "macro_f1": metrics.macro_f1(probabilities.argmax(axis=1), labels, len(rationalizer.labels)),
        "nll": calibration_metrics.negative_log_likelihood(probabilities, labels),
        "ece": calibration_metrics.expected_calibration_error(probabilities, labels),
        **metrics.rate_summary(
            outputs.kept, outputs.selectable, rationalizer.policy.limits(outputs.selectable),
            rationalizer.preprocessor.positions,
        ),
    }  # fmt: skip


def _inputs(rationalizer: Rationalizer, split: Split, indices: np.ndarray, device: torch.device) -> Inputs:
    inputs = split.inputs(indices)
    if rationalizer.policy.selectable == "all":
        inputs = full_length(inputs, rationalizer.preprocessor)
    return to_tensors(inputs, device)


def _classify(rationalizer: Rationalizer, inputs: Inputs, mask: Tensor, slots: int | None = None) -> Tensor:
    """As it is served: a compact predictor computes on the kept features alone.

    Args:
        slots: how many the fullest row of ``mask`` keeps; None: as many as the stored policy allows.
    """
    if rationalizer.predictor.operator != "compact":
        return rationalizer.class_logits(inputs, mask)
    return rationalizer.predictor.gathered(inputs, *kept_positions(mask, slots or rationalizer.capacity))
