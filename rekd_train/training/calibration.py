"""What is fitted on dev after training: the policy's bias and the probability temperature."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor

from rekd_train.evaluation.calibration_metrics import negative_log_likelihood
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.models.gates import apply_policy


def calibrate_bias(scores: Tensor, selectable: Tensor, policy: SelectionPolicy, capacity: int, target: float) -> float:
    """The bias at which the mean share of kept features is ``target``, the budget in force.

    The realised rate grows with the bias, so bisection over the range of the scores finds it. Without
    this step the noise-free rationale of a diffuse selector is empty (docs/log.md).

    Args:
        scores: (n, N) float32 of the dev split.
        selectable: (n, N) bool.

    Returns:
        The smallest bias that reaches the target, moved halfway to the next score that it would let in: the same
        masks, as far from a tie as they can be. The largest useful one if the budget forbids the target.
    """
    counts = selectable.sum(dim=1).clamp(min=1)

    def rate(bias: float) -> float:
        trial = policy.model_copy(update={"bias": bias})
        return float((apply_policy(scores, selectable, trial, capacity).sum(dim=1) / counts).mean())

    low, high = -float(scores[selectable].max()), -float(scores[selectable].min())
    if rate(high) <= target:
        return round(high, 6)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) < target else (low, middle)
    dropped = scores[selectable & (scores <= -high)]
    return round((high - float(dropped.max())) / 2 if len(dropped) else high, 6)


def calibrate_temperature(class_logits: np.ndarray, labels: np.ndarray) -> float:
    """Softmax temperature with the least negative log-likelihood: (n, C) logits, (n,) labels.

    Searched between 0.05 and 20 on a log scale.
    """

    def loss(log_temperature: float) -> float:
        scaled = class_logits / math.exp(log_temperature)
        scaled = scaled - scaled.max(axis=1, keepdims=True)
        probabilities = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
        return negative_log_likelihood(probabilities, labels)

    found = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20.0)), method="bounded")
    return round(float(math.exp(found.x)), 6)
