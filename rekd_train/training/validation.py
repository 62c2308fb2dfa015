"""The dev split during training: which state of a stage is the best so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rekd_train.config.run import RunConfig, SelectionConfig
from rekd_train.data import Split
from rekd_train.evaluation import metrics
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.models.base import Predictor
from rekd_train.models.gates import apply_policy, kept_positions, selection_scores
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training import losses
from rekd_train.training.batches import example_weights
from rekd_train.training.calibration import calibrate_bias
from rekd_train.training.noise import gumbel, key
from rekd_train.training.runtime import Runtime
from rekd_train.training.teacher import all_batches, collected

KEEP_ALL = SelectionPolicy(bias=None, budget=None, minimum=0)
"""The policy of a plain classifier."""


@dataclass(frozen=True)
class Readings:
    """A selector's answers over a split, in its order, on the runtime's device."""

    logits: Tensor
    """(n, N, 2) float32."""
    selectable: Tensor
    """(n, N) bool."""
    real: Tensor
    """(n, N) bool: real features, whatever the policy may choose from."""

    @property
    def scores(self) -> Tensor:
        """(n, N) float32, z1 - z0."""
        return selection_scores(self.logits)


def read_selector(pair: Rationalizer, split: Split, runtime: Runtime, precision: str) -> Readings:
    """One pass of the selector; several processes share it."""
    pair.selector.eval()
    rows, logits, selectable, real = [], [], [], []
    for batch in all_batches(split, runtime, share_out=True):
        with torch.inference_mode(), runtime.autocast(precision):
            logits.append(pair.selector_logits(batch.inputs).float())
            selectable.append(pair.selectable(batch.inputs))
            real.append(pair.selector.backbone.selectable(batch.inputs))
        rows.append(batch.indices)
    whole = [collected(rows, parts, len(split), runtime) for parts in (logits, selectable, real)]
    return Readings(whole[0], whole[1].bool(), whole[2].bool())


def base_policy(selection: SelectionConfig) -> SelectionPolicy:
    """The configured rule before its bias is fitted."""
    if selection.decision == "top-k":
        return SelectionPolicy(
            bias=None, budget=selection.target, minimum=selection.minimum, selectable=selection.selectable
        )
    return SelectionPolicy(
        bias=0.0, budget=selection.budget, minimum=selection.minimum, selectable=selection.selectable
    )


def fitted_policy(pair: Rationalizer, readings: Readings, selection: SelectionConfig) -> SelectionPolicy:
    """The configured rule; 'calibrated': with the bias that meets the target on these readings."""
    policy = base_policy(selection)
    if selection.decision != "calibrated":
        return policy
    capacity = pair.capacity_under(policy)
    bias = calibrate_bias(
        readings.scores.cpu(), readings.selectable.cpu(), policy, capacity, selection.target
    )
    return policy.model_copy(update={"bias": bias})


class DevEvaluation:
    """Measures a pair on dev as the configuration says.

    Args:
        predictor: of the stage.
        with_rationale: keep what the selector keeps; otherwise everything.
        fixed: compaction: masks by the pair's stored policy, kept features alone are computed.
    """

    def __init__(
        self, config: RunConfig, pair: Rationalizer, predictor: Predictor, dev: Split, runtime: Runtime,
        *, with_rationale: bool, fixed: bool = False,
    ) -> None:  # fmt: skip
        self._config, self._pair, self._predictor, self._dev = config, pair, predictor, dev
        self._runtime, self._with_rationale, self._fixed = runtime, with_rationale, fixed
        self._mask: Tensor | None = None
        """Kept between evaluations where the selector is frozen."""
        self._readings: Readings | None = None
        weights = example_weights(dev.labels, config.data.class_weights)
        self._weights = None if weights is None else runtime.to_device(weights)

    def __call__(self, step: int) -> dict[str, float]:
        """``accuracy``, ``macro_f1``, ``extraction_loss`` (L_RE), with rationales ``rate`` (mean share kept)."""
        if self._with_rationale and not (self._fixed and self._mask is not None):
            self._readings = read_selector(
                self._pair, self._dev, self._runtime, self._config.acceleration.precision
            )
            self._mask = self._masks(self._readings, step)
        logits = self._class_logits()
        labels = torch.from_numpy(self._dev.labels).to(logits.device)
        predicted = logits.argmax(dim=1)
        figures = {
            "accuracy": int((predicted == labels).sum()) / len(labels),
            "macro_f1": metrics.macro_f1(predicted.cpu().numpy(), self._dev.labels, logits.shape[1]),
        }
        if self._with_rationale:
            kept, selectable = self._mask.sum(dim=1), self._readings.selectable.sum(dim=1)
            figures["rate"] = (kept / selectable.clamp(min=1)).mean()
            figures["extraction_loss"] = self._extraction_loss(logits, labels)
        else:
            figures["extraction_loss"] = losses.prediction_loss(logits, labels, self._weights)
        return {name: self._runtime.agreed(float(value)) for name, value in figures.items()}

    def _masks(self, readings: Readings, step: int) -> Tensor:
        """(n, N) bool."""
        pair, selection, mode = self._pair, self._config.selection, self._config.stages.evaluation
        if self._fixed:
            policy = pair.policy
        elif mode == "sampled":
            examples = torch.arange(len(self._dev), device=readings.logits.device)
            noisy = readings.logits + gumbel(key(self._config.seed, 1 << 20, step), examples, readings.logits.shape[1])
            return readings.selectable & (selection_scores(noisy) > 0)
        elif mode == "argmax":
            policy = SelectionPolicy(bias=0.0, budget=None, minimum=0, selectable=selection.selectable)
        elif mode == "top-k":
            policy = SelectionPolicy(bias=None, budget=selection.target, minimum=1, selectable=selection.selectable)
        else:
            policy = fitted_policy(pair, readings, selection)
        return apply_policy(readings.scores, readings.selectable, policy, pair.capacity_under(policy))

    def _class_logits(self) -> Tensor:
        """(n, C) on the masks."""
        self._predictor.eval()
        precision = self._config.acceleration.precision
        rows, parts = [], []
        for batch in all_batches(self._dev, self._runtime, share_out=True):
            with torch.inference_mode(), self._runtime.autocast(precision):
                selectable = self._pair.selectable(batch.inputs)
                keep = selectable
                if self._with_rationale:
                    keep = self._mask[batch.indices][:, : selectable.shape[1]]
                if self._fixed:
                    found = self._predictor.gathered(batch.inputs, *kept_positions(keep, self._pair.capacity))
                else:
                    found = self._predictor(batch.inputs, keep, selectable)
                parts.append(found.float())
            rows.append(batch.indices)
        return collected(rows, parts, len(self._dev), self._runtime)

    def _extraction_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """L_RE as in training: mean over batches of the dev split, in its order."""
        selection, size = self._config.selection, self._config.optimisation.batch_size
        kept = self._mask.sum(dim=1).float()
        if selection.denominator == "all":
            features = torch.full_like(kept, float(self._pair.preprocessor.positions))
        else:
            features = self._readings.real.sum(dim=1).float()
        on_counts = selection.penalty_on == "counts"
        selectable = self._readings.selectable
        values = []
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            weights = None if self._weights is None else self._weights[part]
            value = losses.prediction_loss(logits[part], labels[part], weights)
            if selection.penalty_per == "example":
                penalty = losses.example_penalty(kept[part], features[part], selection.target, on_counts)
            else:
                examples = len(labels[part]) if on_counts else None
                penalty = losses.batch_penalty(kept[part].sum(), features[part].sum(), selection.target, examples)
            value = value + selection.weight * penalty
            if selection.continuity:
                value = value + selection.continuity * losses.discontinuity(
                    self._mask[part].float(), selectable[part], self._pair.selector.backbone.columns
                )
            values.append(value)
        return torch.stack(values).mean()


class Best:
    """The best state of a stage so far.

    Args:
        metric: 'accuracy' or 'macro_f1' (highest; of equals the one of least L_RE) or 'extraction_loss' (least, the
            later of equals; with rationales rounded to three decimals, without them as it is, as in the authors' code).
    """

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self.value: tuple[float, float] | None = None
        """What is compared; higher is better."""
        self.step = 0
        self.since = 0
        self.weights: dict[str, Tensor] = {}

    def offer(self, step: int, figures: dict[str, float], weights: dict[str, Tensor]) -> bool:
        """Consider a state; True if it is the best. Its weights are copied to the CPU."""
        extraction = figures["extraction_loss"]
        if self._metric == "extraction_loss":
            value = (-round(extraction, 3) if "rate" in figures else -extraction, float(step))
        else:
            value = (figures[self._metric], -extraction)
        better = math.isfinite(extraction) and (self.value is None or value > self.value)
        if better:
            self.value, self.step, self.since = value, step, 0
            self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
        else:
            self.since += 1
        return better

    def state(self) -> dict:
        """For the saved state."""
        return {"value": self.value, "step": self.step, "since": self.since, "weights": self.weights}

    def restore(self, state: dict) -> None:
        """The counterpart of ``state``."""
        self.value, self.step, self.since = state["value"], state["step"], state["since"]
        self.weights = state["weights"]
