"""The dev split: what is fitted on it (decision rule, temperature) and how a pair is measured on it in training."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from torch import Tensor

from rekd_train.config.run import RunConfig, SelectionConfig
from rekd_train.data import Split
from rekd_train.evaluation import metrics
from rekd_train.evaluation.forward import run_split
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.models.base import Predictor, apply_policy, selection_scores
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training import losses
from rekd_train.training.losses import gumbel, key
from rekd_train.training.runtime import Batch, Runtime, example_weights, run_frozen


class Readings(NamedTuple):
    """A selector's outputs over a split, in its order, on the runtime's device."""

    logits: Tensor  # (n, N, 2) float32
    selectable: Tensor  # (n, N) bool
    real: Tensor  # (n, N) bool: real features, whatever the policy may choose from

    @property
    def scores(self) -> Tensor:
        """(n, N) float32, z1 - z0."""
        return selection_scores(self.logits)

    def mask(self, pair: Rationalizer, policy: SelectionPolicy) -> Tensor:
        """(n, N) bool, noise-free."""
        return apply_policy(self.scores, self.selectable, policy, pair.capacity_under(policy))


def read_selector(pair: Rationalizer, split: Split, runtime: Runtime, precision: str) -> Readings:
    """One pass of the selector; several processes share it."""
    pair.selector.eval()

    def forward(batch: Batch) -> tuple[Tensor, ...]:
        real = pair.selector.backbone.selectable(batch.inputs)
        return pair.selector_logits(batch.inputs), pair.selectable(batch.inputs), real

    logits, selectable, real = run_frozen(split, runtime, precision, forward, count=3)
    return Readings(logits, selectable.bool(), real.bool())


def base_policy(selection: SelectionConfig) -> SelectionPolicy:
    """The configured rule before its bias is fitted."""
    top = selection.decision == "top-k"
    return SelectionPolicy(
        bias=None if top else 0.0, budget=selection.target if top else selection.budget,
        minimum=selection.minimum, selectable=selection.selectable,
    )  # fmt: skip


def fitted_policy(pair: Rationalizer, readings: Readings, selection: SelectionConfig) -> SelectionPolicy:
    """The configured rule; 'calibrated': with the bias that meets the target on these readings."""
    policy = base_policy(selection)
    if selection.decision != "calibrated":
        return policy
    capacity = pair.capacity_under(policy)
    bias = calibrate_bias(readings.scores.cpu(), readings.selectable.cpu(), policy, capacity, selection.target)
    return policy.model_copy(update={"bias": bias})


class DevEvaluation:
    """Measures a pair on dev as the configuration says.

    Args:
        with_rationale: keep what the selector keeps; otherwise everything.
        fixed: compaction: masks by the pair's stored policy, kept features alone are computed.
    """

    def __init__(
        self, config: RunConfig, pair: Rationalizer, predictor: Predictor, dev: Split, runtime: Runtime,
        *, with_rationale: bool, fixed: bool = False,
    ) -> None:  # fmt: skip
        self._config, self._pair, self._predictor, self._dev = config, pair, predictor, dev
        self._runtime, self._with_rationale, self._fixed = runtime, with_rationale, fixed
        self._precision = config.acceleration.precision
        self._mask: Tensor | None = None  # kept between evaluations where the selector is frozen
        self._readings: Readings | None = None
        weights = example_weights(dev.labels, config.data.class_weights)
        self._weights = None if weights is None else runtime.to_device(weights)

    def __call__(self, step: int) -> dict[str, float]:
        """``accuracy``, ``macro_f1``, ``extraction_loss`` (L_RE), with rationales ``selection_rate`` (mean share)."""
        if self._with_rationale and not (self._fixed and self._mask is not None):
            self._readings = read_selector(self._pair, self._dev, self._runtime, self._precision)
            self._mask = self._masks(self._readings, step)
        logits = self._class_logits()
        labels = torch.from_numpy(self._dev.labels).to(logits.device)
        predicted = logits.argmax(dim=1)
        macro_f1 = metrics.macro_f1(predicted.cpu().numpy(), self._dev.labels)
        figures = {"accuracy": int((predicted == labels).sum()) / len(labels), "macro_f1": macro_f1}
        if self._with_rationale:
            kept, selectable = self._mask.sum(dim=1), self._readings.selectable.sum(dim=1)
            figures["selection_rate"] = (kept / selectable.clamp(min=1)).mean()
            figures["extraction_loss"] = self._extraction_loss(logits, labels)
        else:
            figures["extraction_loss"] = losses.prediction_loss(logits, labels, self._weights)
        # the main process's, so that all of them decide alike
        return {name: self._runtime.gathered(float(value))[0] for name, value in figures.items()}

    def _masks(self, readings: Readings, step: int) -> Tensor:
        """(n, N) bool."""
        if self._fixed:
            return readings.mask(self._pair, self._pair.policy)
        if self._config.stages.evaluation == "sampled":
            examples = torch.arange(len(self._dev), device=readings.logits.device)
            noisy = readings.logits + gumbel(key(self._config.seed, 1 << 20, step), examples, readings.logits.shape[1])
            return readings.selectable & (selection_scores(noisy) > 0)
        return readings.mask(self._pair, fitted_policy(self._pair, readings, self._config.selection))

    def _class_logits(self) -> Tensor:
        """(n, C) on the masks."""
        # drawn ones know no budget
        slots = max(1, int(self._mask.sum(dim=1).max())) if self._with_rationale else None

        def forward(batch: Batch) -> tuple[Tensor]:
            selectable = self._pair.selectable(batch.inputs)
            keep = self._mask[batch.indices][:, : selectable.shape[1]] if self._with_rationale else selectable
            if self._with_rationale and self._predictor.operator == "compact":
                return (self._pair.gathered_class_logits(batch.inputs, keep, slots),)
            return (self._predictor(batch.inputs, keep, selectable),)

        self._predictor.eval()
        return run_frozen(self._dev, self._runtime, self._precision, forward, count=1)[0]

    def _extraction_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """L_RE as in training: mean over batches of the dev split, in its order."""
        selection, pair, size = self._config.selection, self._pair, self._config.optimisation.batch_size
        mask, selectable, real = self._mask.float(), self._readings.selectable, self._readings.real.sum(dim=1)
        features = losses.penalised_features(real, pair.preprocessor.positions, selection)
        values = []
        for part in (slice(start, start + size) for start in range(0, len(labels), size)):
            weights = None if self._weights is None else self._weights[part]
            value = losses.prediction_loss(logits[part], labels[part], weights)
            kept = mask[part].sum(dim=1)
            value = value + selection.weight * losses.selection_penalty(kept, features[part], selection, len(kept))
            if selection.continuity:
                scattered = losses.discontinuity(mask[part], selectable[part], pair.selector.backbone.columns)
                value = value + selection.continuity * scattered
            values.append(value)
        return torch.stack(values).mean()


def calibrate_bias(scores: Tensor, selectable: Tensor, policy: SelectionPolicy, capacity: int, target: float) -> float:
    """The bias at which the mean share of kept features is ``target``, the budget in force: (n, N) scores of dev.

    The selection rate grows with the bias, so bisection finds the smallest one that reaches the target. It is moved
    halfway to the next score that it would let in: the same masks, as far from a tie as they can be. If the budget
    forbids the target it is the largest useful one. Unfitted, a diffuse selector keeps nothing (docs/log.md).
    """
    counts = selectable.sum(dim=1).clamp(min=1)

    def selection_rate(bias: float) -> float:
        trial = policy.model_copy(update={"bias": bias})
        return float((apply_policy(scores, selectable, trial, capacity).sum(dim=1) / counts).mean())

    low, high = -float(scores[selectable].max()), -float(scores[selectable].min())
    if selection_rate(high) <= target:
        return round(high, 6)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if selection_rate(middle) < target else (low, middle)
    dropped = scores[selectable & (scores <= -high)]
    return round((high - float(dropped.max())) / 2 if len(dropped) else high, 6)


def calibrate_policy(config: RunConfig, rationalizer: Rationalizer, dev: Split, runtime: Runtime) -> None:
    """Fit the bias of the decision rule on dev to the configured target, in place."""
    rationalizer.policy = base_policy(config.selection)
    if config.selection.decision == "calibrated":
        readings = read_selector(rationalizer, dev, runtime, "fp32")
        rationalizer.policy = fitted_policy(rationalizer, readings, config.selection)


def calibrate_temperature(rationalizer: Rationalizer, dev: Split) -> Rationalizer:
    """Fit the softmax temperature, in 0.05..20, with the least negative log-likelihood on dev, in place."""
    logits = run_split(rationalizer, dev).class_logits

    def loss(log_temperature: float) -> float:
        return metrics.negative_log_likelihood(softmax(logits / math.exp(log_temperature), axis=1), dev.labels)

    found = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20.0)), method="bounded")
    rationalizer.probability_temperature = round(float(math.exp(found.x)), 6)
    return rationalizer.eval()
