"""The loss of each stage, as modules that hold what is trained.

``forward(batch)`` gives this process's parts of the figures: over the processes they add up to those of the
whole batch. ``loss`` carries the gradient; ``kept`` and ``features`` count, the others are detached losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from rekd_train.config.run import RunConfig
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.models.base import (
    Predictor,
    apply_policy,
    kept_positions,
    relaxed_log_choice,
    selection_scores,
    straight_through_gate,
)  # fmt: skip
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training import losses
from rekd_train.training.losses import gumbel, key, uniform, uniform_scalar
from rekd_train.training.runtime import Batch, Runtime
from rekd_train.training.teacher import Teaching

QUIET_TEMPERATURE = 2.0  # tau of the prediction term in stages without an annealed one

Figures = dict[str, Tensor]


class Objective(nn.Module, ABC):
    """What one stage minimises; its parameters are what the stage trains.

    Args:
        seed: of the stage's noise, a ``losses.key``.
        predictor: None: the pair's own.
    """

    trains_selector = False
    trains_predictor = True

    def __init__(
        self, config: RunConfig, pair: Rationalizer, runtime: Runtime, seed: int, teacher: Teaching | None = None,
        predictor: Predictor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.runtime, self.seed, self.teacher = config, runtime, seed, teacher
        self.__dict__["pair"] = pair  # no submodule: only what a stage registers is trained
        if self.trains_selector:
            self.selector = pair.selector
        if self.trains_predictor:
            self.predictor = predictor or pair.predictor

    def forward(self, batch: Batch) -> Figures:
        """This process's parts of the figures."""
        with self.runtime.autocast(self.config.acceleration.precision):
            return self.figures(batch)

    @abstractmethod
    def figures(self, batch: Batch) -> Figures:
        """The stage's own computation."""

    def classified(self, batch: Batch, class_logits: Tensor) -> Tensor:
        """Cross-entropy, with a teacher alpha of it and 1 - alpha of the prediction term."""
        value = losses.prediction_loss(class_logits, batch.labels, batch.weights)
        settings = self.config.distillation
        if self.teacher is None or settings.alpha == 1.0:
            return value
        alpha = 0.5 if settings.alpha == "anneal" else settings.alpha
        term = self.distilled(batch, self.teacher.class_logits(batch), class_logits, QUIET_TEMPERATURE)
        return alpha * value + (1 - alpha) * settings.prediction_weight * term

    def distilled(self, batch: Batch, theirs: Tensor, ours: Tensor, temperature: float) -> Tensor:
        """The prediction term on the teacher's and the student's (B, C) logits."""
        known = self.teacher.known_classes(batch)
        if self.config.distillation.hard_labels:
            return losses.prediction_loss(ours, theirs.argmax(dim=-1), None if known is None else known.float())
        if known is not None:  # where it says nothing, nothing is to be learned: the term and its gradient are 0
            theirs = torch.where(known.unsqueeze(-1), theirs, ours.detach())
        return losses.prediction_distillation(theirs, ours, temperature)

    def rationale_term(self, batch: Batch, logits: Tensor, noise: Tensor | None, selectable: Tensor,
                       annealed: float) -> Tensor:
        """This part's term on the teacher's rationale and the selector's logits (B, N, 2)."""
        settings, positions = self.config.distillation, logits.shape[1]
        temperature = settings.rationale_temperature or annealed
        noisy = settings.noise == "independent"
        theirs = gumbel(self.stream(1, batch.step), batch.indices, positions) if noisy else None
        student = relaxed_log_choice(logits, temperature, noise if noisy else None)
        known, marks = self.teacher.known_tokens(batch, positions), self.teacher.marks(batch, positions)
        scored = selectable if known is None else selectable & known
        if not settings.hard_labels:
            teacher = relaxed_log_choice(self.teacher.selector_logits(batch, positions), temperature, theirs)
            term = losses.rationale_distillation(teacher, student, scored)
        else:
            if noisy:
                decisions = (self.teacher.selector_logits(batch, positions) + theirs).argmax(dim=-1) == 1
            else:
                decisions = self.teacher.mask(batch, positions)
            term = losses.hard_rationale_distillation(decisions, student, scored)
        if marks is None:
            return term
        smoothing, unmarked = settings.mark_smoothing, settings.unmarked_weight
        return term + losses.mark_distillation(marks, student, selectable, smoothing, unmarked)

    def random_mask(self, batch: Batch, positions: int) -> Tensor:
        """(B, N) bool: rates from the target up to everything, so that all of them are familiar."""
        target = self.config.selection.target
        rates = target + (1 - target) * uniform(self.stream(1, batch.step), batch.indices, 1).square()
        return uniform(self.stream(2, batch.step), batch.indices, positions) < rates

    def stream(self, purpose: int, step: int) -> int:
        """Key of the draws for one purpose in one step."""
        return key(self.seed, purpose, step)


def penalised(objective: Objective, batch: Batch, mask: Tensor, selectable: Tensor) -> tuple[Tensor, Figures]:
    """This process's part of lambda L_select for a mask or chances (B, N), and the counts behind it."""
    selection, pair, present = objective.config.selection, objective.pair, float(batch.present > 0)
    kept = present * torch.where(selectable, mask, 0.0).sum(dim=1)
    real = pair.selector.backbone.selectable(batch.inputs).sum(dim=1)
    features = present * losses.penalised_features(real, pair.preprocessor.positions, selection)
    # what the whole batch keeps, over all processes, is what meets the target
    penalty = losses.selection_penalty(kept, features, selection, batch.examples, objective.runtime.total)
    whole = selection.penalty_per == "batch"
    penalty = objective.runtime.shared(penalty) if whole else batch.share * penalty
    return selection.weight * penalty, {"kept": kept.sum().detach(), "features": features.sum().detach()}


class ClassifierObjective(Objective):
    """A predictor alone, the pair's or one over the selector's backbone; random masks prepare it for rationales."""

    def figures(self, batch: Batch) -> Figures:
        """Parts of ``loss``."""
        selectable = self.pair.selectable(batch.inputs)
        keep = selectable.float()
        if uniform_scalar(self.stream(0, batch.step)) < self.config.stages.masked_share:
            keep = keep * self.random_mask(batch, keep.shape[1])
        class_logits = self.predictor(batch.inputs, keep, selectable)
        return {"loss": batch.share * self.classified(batch, class_logits)}


class RationaleObjective(Objective):
    """Selector and predictor together: L_RE, or alpha L_RE + (1 - alpha) L_KD (REKD sec. 3.3)."""

    trains_selector = True

    def figures(self, batch: Batch) -> Figures:
        """``loss``, ``extraction`` (L_RE), ``penalty``; with continuity ``discontinuity``; with a teacher the terms."""
        config, settings = self.config, self.config.distillation
        progress = losses.refreshed_step(batch.step, config.temperature.refresh) / batch.steps
        temperature = losses.annealed_temperature(progress, config.temperature)
        selectable = self.pair.selectable(batch.inputs)
        logits = self.selector(batch.inputs)
        noise = gumbel(self.stream(0, batch.step), batch.indices, logits.shape[1])
        gate = straight_through_gate(logits, temperature, noise)
        class_logits, read = self._class_logits(batch, gate.mask, logits + noise, selectable)

        penalty, figures = penalised(self, batch, gate.mask, selectable)
        extraction = batch.share * losses.prediction_loss(class_logits, batch.labels, batch.weights) + penalty
        if config.selection.continuity:
            scattered = losses.discontinuity(gate.mask, selectable, self.selector.backbone.columns)
            scattered = batch.share * config.selection.continuity * scattered
            extraction = extraction + scattered
            figures |= {"discontinuity": scattered.detach()}
        figures |= {"extraction": extraction.detach(), "penalty": penalty.detach()}
        if self.teacher is None:
            return figures | {"loss": extraction}

        rationale = prediction = torch.zeros((), device=logits.device)
        if settings.rationale_weight:
            rationale = batch.share * self.rationale_term(batch, logits, noise, selectable, temperature)
        if settings.prediction_weight:
            own = settings.teacher_mask == "teacher"
            theirs = self.teacher.class_logits(batch) if own else self.teacher.class_logits_on(batch, read)
            prediction = batch.share * self.distilled(batch, theirs, class_logits, temperature)
        alpha = losses.annealed_alpha(progress, config.temperature) if settings.alpha == "anneal" else settings.alpha
        distilled = settings.rationale_weight * rationale + settings.prediction_weight * prediction
        figures |= {"rationale": rationale.detach(), "prediction": prediction.detach()}
        return figures | {"loss": alpha * extraction + (1 - alpha) * distilled}

    def _class_logits(self, batch: Batch, mask: Tensor, noisy: Tensor, selectable: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C), and what was read of the mask (B, N)."""
        if self.config.stages.operator == "zero":
            return self.predictor(batch.inputs, mask, selectable), mask
        # a draw keeps more or less than the rule will; of more than twice the target the surest are read
        selection = self.config.selection
        policy = SelectionPolicy(bias=0.0, budget=min(1.0, 2 * selection.target), minimum=selection.minimum)
        capacity = policy.capacity(mask.shape[1])
        drawn = mask > 0.5  # the minimum is room for short texts here; it adds nothing to what was drawn
        read = drawn & apply_policy(selection_scores(noisy.detach()), selectable, policy, capacity)
        positions, kept = kept_positions(read, capacity)
        return self.predictor.gathered(batch.inputs, positions, mask.gather(1, positions) * kept), read


class CompactObjective(Objective):
    """The predictor alone on gathered features, by the (n, N) rationales of all examples or by what is found anew."""

    def __init__(self, *given: Any, mask: Tensor | None = None) -> None:
        super().__init__(*given)
        self.mask = mask

    def figures(self, batch: Batch) -> Figures:
        """Parts of ``loss``."""
        if self.mask is not None:
            mask = self.mask[batch.indices][:, : self.pair.selectable(batch.inputs).shape[1]]
        else:
            with torch.no_grad():
                mask = self.pair.select(batch.inputs).mask
        return {"loss": batch.share * self.classified(batch, self.pair.gathered_class_logits(batch.inputs, mask))}
