"""One training loop: warm start, rationale extraction or distillation, compaction, calibration.

``fit(config, data)`` trains a pair alone; ``fit(config, data, teacher=pair)`` distils it. The stages:

1. classifier: the predictor learns the task, half of the batches through random keep masks;
2. rationale: selector (started from the predictor where the sizes agree) and predictor learn together
   through the straight-through Gumbel mask, with a teacher also from its rationales and predictions;
3. compact: selector frozen, the predictor learns to read gathered tokens alone;
and the decision rule and the probability temperature are fitted on dev.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rekd_train import losses
from rekd_train.calibration import calibrate_bias, calibrate_temperature
from rekd_train.config import RunConfig
from rekd_train.data import Split, bucketed_batches
from rekd_train.errors import TrainingError
from rekd_train.evaluation import run_selector, run_split, to_tensors
from rekd_train.models.gates import (
    apply_policy,
    gumbel_noise,
    kept_positions,
    relaxed_log_choice,
    straight_through_gate,
)
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.optimisation import optimiser_for
from rekd_train.policy import SelectionPolicy
from rekd_train.schedules import annealed_alpha, annealed_temperature, learning_rate_factor
from rekd_train.teacher import TeacherOutputs, run_teacher

KEEP_ALL = SelectionPolicy(bias=None, budget=None, minimum=0)
"""The policy of a plain classifier."""


class Observer(Protocol):
    """Is told how training goes; a progress bar, a log, or nothing."""

    def stage(self, name: str, steps: int) -> None:
        """A stage of so many optimiser steps begins."""

    def step(self, values: dict[str, float]) -> None:
        """A step ended; ``values`` is empty on most steps, since reading a loss waits for the device."""


class Silent:
    """An observer that ignores everything."""

    def stage(self, name: str, steps: int) -> None:
        pass

    def step(self, values: dict[str, float]) -> None:
        pass


@dataclass
class Batch:
    """One training step's examples."""

    indices: np.ndarray
    inputs: dict[str, Tensor]
    labels: Tensor
    progress: float
    """Share of the stage that is done, in [0, 1)."""
    step: int


def fit(
    config: RunConfig,
    rationalizer: Rationalizer,
    train: Split,
    dev: Split,
    *,
    teacher: Rationalizer | None = None,
    warm: bool = False,
    observer: Observer | None = None,
) -> Rationalizer:
    """Train a pair in place through the stages of its configuration.

    Args:
        rationalizer: a fresh pair, or one whose predictor is trained already (``warm``).
        teacher: a trained pair with the same preprocessing; None: plain rationale extraction.
        warm: leave the classifier stage out.

    Returns:
        The same pair, with its policy and temperature calibrated, in evaluation mode.

    Raises:
        TrainingError: the loss is not finite, or the selector keeps nothing or everything.
    """
    trainer = _Trainer(config, rationalizer, train, dev, observer or Silent())
    stages = config.stages
    if stages.classifier_epochs and not warm:
        trainer.classifier(stages.classifier_epochs)
    if stages.rationale_epochs:
        rationalizer.predictor.operator = "zero"
        targets = run_teacher(teacher, train) if teacher is not None else None
        trainer.rationale(stages.rationale_epochs, teacher, targets)
        calibrate_policy(config, rationalizer, dev)
        if stages.compact_epochs:
            trainer.compact(stages.compact_epochs, targets)
    else:
        rationalizer.policy = KEEP_ALL
    rationalizer.probability_temperature = calibrate_temperature(run_split(rationalizer, dev).class_logits, dev.labels)
    return rationalizer.eval()


def compact_pair(
    config: RunConfig,
    rationalizer: Rationalizer,
    train: Split,
    dev: Split,
    *,
    teacher: Rationalizer | None = None,
    observer: Observer | None = None,
) -> Rationalizer:
    """The compact stage alone, in place: any trained pair becomes one that serves gathered tokens."""
    trainer = _Trainer(config, rationalizer, train, dev, observer or Silent())
    targets = run_teacher(teacher, train) if teacher is not None else None
    trainer.compact(config.stages.compact_epochs or 1.0, targets)
    rationalizer.probability_temperature = calibrate_temperature(run_split(rationalizer, dev).class_logits, dev.labels)
    return rationalizer.eval()


def calibrate_policy(config: RunConfig, rationalizer: Rationalizer, dev: Split) -> None:
    """Fit the bias of the decision rule on dev to the configured target rate."""
    selection = config.selection
    policy = SelectionPolicy(bias=0.0, budget=selection.budget, minimum=selection.minimum)
    rationalizer.policy = policy
    outputs = run_selector(rationalizer, dev)
    bias = calibrate_bias(outputs.scores, outputs.selectable, policy, rationalizer.capacity, selection.target)
    rationalizer.policy = policy.model_copy(update={"bias": bias})


class _Trainer:
    """The loop that all stages share, and the loss of each."""

    def __init__(
        self,
        config: RunConfig,
        rationalizer: Rationalizer,
        train: Split,
        dev: Split,
        observer: Observer,
    ) -> None:
        self.config = config
        self.model = rationalizer
        self.train_split = train
        self.dev = dev
        self.observer = observer
        self.device = next(rationalizer.parameters()).device
        self.order = np.random.default_rng(config.seed)
        self.noise = torch.Generator(device=self.device).manual_seed(config.seed)

    def classifier(self, epochs: float) -> None:
        """The predictor alone; random keep masks prepare it for reading rationales."""
        predictor, share = self.model.predictor, self.config.stages.masked_share
        target = self.config.selection.target

        def loss(batch: Batch) -> Tensor:
            selectable = self.model.selectable(batch.inputs)
            keep = selectable.float()
            if torch.rand((), generator=self.noise, device=self.device) < share:
                # rates from the target up to everything, so that all of them are familiar
                uniform = torch.rand((len(keep), 1), generator=self.noise, device=self.device)
                rates = target + (1 - target) * uniform.square()
                keep = keep * (torch.rand(keep.shape, generator=self.noise, device=self.device) < rates)
            return losses.prediction_loss(predictor(batch.inputs, keep, selectable), batch.labels)

        self._run("classifier", epochs, predictor, loss)
        self._start_selector_from_predictor()

    def rationale(self, epochs: float, teacher: Rationalizer | None, targets: TeacherOutputs | None) -> None:
        """Selector and predictor together: L_RE, or alpha L_RE + (1 - alpha) L_KD (REKD eq. of sec. 3.3)."""
        config, selection, distillation = self.config, self.config.selection, self.config.distillation

        def loss(batch: Batch) -> Tensor:
            temperature = annealed_temperature(batch.progress, config.temperature)
            selectable = self.model.selectable(batch.inputs)
            logits = self.model.selector_logits(batch.inputs)
            noise = gumbel_noise(logits.shape, self.noise)
            gate = straight_through_gate(logits, temperature, noise)
            class_logits = self.model.class_logits(batch.inputs, gate.mask)
            extraction = losses.prediction_loss(class_logits, batch.labels)
            extraction = extraction + selection.weight * losses.rate_penalty(gate.mask, selectable, selection.target)
            if targets is None:
                return extraction
            fixed = distillation.rationale_temperature or temperature
            teacher_noise = noise if distillation.noise == "shared" else gumbel_noise(logits.shape, self.noise)
            quiet = distillation.noise == "none"
            rationale_term = losses.rationale_distillation(
                relaxed_log_choice(targets.selector_logits(batch), fixed, None if quiet else teacher_noise),
                relaxed_log_choice(logits, fixed, None if quiet else noise),
                selectable,
            )
            if distillation.teacher_mask == "teacher":
                teacher_logits = targets.class_logits(batch)
            else:
                with torch.no_grad():
                    teacher_logits = teacher.class_logits(batch.inputs, gate.mask)
            prediction_term = losses.prediction_distillation(teacher_logits, class_logits, temperature)
            distilled = (
                distillation.rationale_weight * rationale_term + distillation.prediction_weight * prediction_term
            )
            alpha = distillation.alpha
            if alpha == "anneal":
                alpha = annealed_alpha(batch.progress, config.temperature)
            return alpha * extraction + (1 - alpha) * distilled

        trained = torch.nn.ModuleList([self.model.selector, self.model.predictor])
        self._run("distillation" if targets else "rationale", epochs, trained, loss)

    def compact(self, epochs: float, targets: TeacherOutputs | None) -> None:
        """The predictor alone on gathered tokens; the selector and its policy are frozen."""
        model, distillation = self.model, self.config.distillation
        outputs = run_selector(model, self.train_split)
        mask = apply_policy(outputs.scores, outputs.selectable, model.policy, model.capacity)
        positions, kept = kept_positions(mask, model.capacity)
        model.predictor.operator = "compact"

        def loss(batch: Batch) -> Tensor:
            rows = torch.from_numpy(batch.indices)
            class_logits = model.predictor.gathered(
                batch.inputs, positions[rows].to(self.device), kept[rows].to(self.device)
            )
            value = losses.prediction_loss(class_logits, batch.labels)
            if targets is None or distillation.alpha == 1.0:
                return value
            return 0.5 * value + 0.5 * losses.prediction_distillation(targets.class_logits(batch), class_logits, 2.0)

        self._run("compact", epochs, model.predictor, loss)

    def _run(self, name: str, epochs: float, module: torch.nn.Module, loss: Callable[[Batch], Tensor]) -> None:
        settings = self.config.optimisation
        steps = max(1, round(epochs * len(self.train_split) / settings.batch_size))
        optimiser = optimiser_for(module, settings)
        rates = [group["lr"] for group in optimiser.param_groups]
        self.observer.stage(name, steps)
        module.train()
        for batch in self._batches(steps):
            factor = learning_rate_factor((batch.step + 1) / (steps + 1), settings.warmup)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            value = loss(batch)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), settings.gradient_clip, foreach=True)
            optimiser.step()
            self.observer.step(self._read(name, batch.step, steps, value))
        module.eval()

    def _read(self, name: str, step: int, steps: int, value: Tensor) -> dict[str, float]:
        """The loss every few steps only: reading it waits for the device."""
        if step % 20 and step != steps - 1:
            return {}
        number = float(value.detach())
        if not np.isfinite(number):
            raise TrainingError(f"{name}: the loss is {number} at step {step}; fix: a lower optimisation.learning_rate")
        return {"loss": number}

    def _batches(self, steps: int) -> Iterator[Batch]:
        step = 0
        while True:
            for indices in bucketed_batches(self.train_split.lengths, self.config.optimisation.batch_size, self.order):
                labels = torch.from_numpy(self.train_split.labels[indices]).to(self.device)
                inputs = to_tensors(self.train_split.inputs(indices), self.device)
                yield Batch(indices, inputs, labels, step / steps, step)
                step += 1
                if step == steps:
                    return

    def _start_selector_from_predictor(self) -> None:
        """Where the sizes agree the selector starts from what the predictor has learnt to read."""
        mine, theirs = self.model.selector.backbone, self.model.predictor.backbone
        same = {name: t.shape for name, t in mine.state_dict().items()} == {
            name: t.shape for name, t in theirs.state_dict().items()
        }
        if same:
            mine.load_state_dict(theirs.state_dict())
