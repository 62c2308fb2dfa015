"""The loss of each stage, as modules that hold what is trained.

``forward(batch)`` gives this process's parts of the figures: over the processes they add up to those of the
whole batch. ``loss`` carries the gradient; ``kept`` and ``features`` count, the others are detached losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from rekd_train.config.run import DistillationConfig, RunConfig
from rekd_train.models.base import Predictor
from rekd_train.models.gates import relaxed_log_choice, straight_through_gate
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training import losses
from rekd_train.training.batches import Batch, gumbel, key, uniform, uniform_scalar
from rekd_train.training.runtime import Runtime
from rekd_train.training.teacher import Teacher

QUIET_TEMPERATURE = 2.0
"""tau of the prediction term in stages without an annealed one."""

Figures = dict[str, Tensor]


class Objective(nn.Module, ABC):
    """What one stage minimises; its parameters are what the stage trains.

    Args:
        seed: of the stage's noise, a ``batches.key``.
        teacher: learned from, too; None: labels only.
    """

    def __init__(
        self, config: RunConfig, pair: Rationalizer, runtime: Runtime, seed: int, teacher: Teacher | None
    ) -> None:
        super().__init__()
        self.config, self.runtime, self.seed, self.teacher = config, runtime, seed, teacher
        self._pair = (pair,)  # in a tuple it is no submodule: only what a stage registers is trained

    @property
    def pair(self) -> Rationalizer:
        """The pair whose parts are trained."""
        return self._pair[0]

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
        term = _prediction_term(settings, self.teacher.class_logits(batch), class_logits, QUIET_TEMPERATURE)
        return alpha * value + (1 - alpha) * settings.prediction_weight * term

    def stream(self, purpose: int, step: int) -> int:
        """Key of the draws for one purpose in one step."""
        return key(self.seed, purpose, step)


class ClassifierObjective(Objective):
    """A predictor alone; random keep masks prepare it for reading rationales.

    Args:
        predictor: the pair's, or one over the selector's backbone for its own warm start.
    """

    def __init__(
        self, config: RunConfig, pair: Rationalizer, predictor: Predictor, runtime: Runtime, seed: int,
        teacher: Teacher | None,
    ) -> None:  # fmt: skip
        super().__init__(config, pair, runtime, seed, teacher)
        self.predictor = predictor

    def figures(self, batch: Batch) -> Figures:
        """Parts of ``loss``."""
        selectable = self.pair.selectable(batch.inputs)
        keep = selectable.float()
        if uniform_scalar(self.stream(0, batch.step)) < self.config.stages.masked_share:
            target = self.config.selection.target
            # rates from the target up to everything, so that all of them are familiar
            rates = target + (1 - target) * uniform(self.stream(1, batch.step), batch.indices, 1).square()
            keep = keep * (uniform(self.stream(2, batch.step), batch.indices, keep.shape[1]) < rates)
        class_logits = self.predictor(batch.inputs, keep, selectable)
        return {"loss": batch.share * self.classified(batch, class_logits)}


class RationaleObjective(Objective):
    """Selector and predictor together: L_RE, or alpha L_RE + (1 - alpha) L_KD (REKD sec. 3.3)."""

    def __init__(
        self, config: RunConfig, pair: Rationalizer, runtime: Runtime, seed: int, teacher: Teacher | None
    ) -> None:
        super().__init__(config, pair, runtime, seed, teacher)
        self.selector, self.predictor = pair.selector, pair.predictor

    def figures(self, batch: Batch) -> Figures:
        """Parts of ``loss``, ``extraction`` (L_RE), ``penalty``, with continuity ``discontinuity``, with a teacher
        ``rationale`` and ``prediction``.
        """
        config = self.config
        progress = losses.refreshed_step(batch.step, config.temperature.refresh) / batch.steps
        temperature = losses.annealed_temperature(progress, config.temperature)
        selectable = self.pair.selectable(batch.inputs)
        logits = self.selector(batch.inputs)
        noise = gumbel(self.stream(0, batch.step), batch.indices, logits.shape[1])
        gate = straight_through_gate(logits, temperature, noise)
        class_logits = self.predictor(batch.inputs, gate.mask, selectable)

        penalty, figures = self._penalty(batch, gate.mask, selectable)
        extraction = batch.share * losses.prediction_loss(class_logits, batch.labels, batch.weights) + penalty
        if config.selection.continuity:
            scattered = losses.discontinuity(gate.mask, selectable, self.selector.backbone.columns)
            scattered = batch.share * config.selection.continuity * scattered
            extraction = extraction + scattered
            figures |= {"discontinuity": scattered.detach()}
        figures |= {"extraction": extraction.detach(), "penalty": penalty.detach()}
        if self.teacher is None:
            return figures | {"loss": extraction}

        settings = config.distillation
        rationale = prediction = torch.zeros((), device=logits.device)
        if settings.rationale_weight:
            rationale = batch.share * self._rationale_term(batch, logits, noise, selectable, temperature)
        if settings.prediction_weight:
            own = settings.teacher_mask == "teacher"
            theirs = self.teacher.class_logits(batch) if own else self.teacher.class_logits_on(batch, gate.mask)
            prediction = batch.share * _prediction_term(settings, theirs, class_logits, temperature)
        alpha = losses.annealed_alpha(progress, config.temperature) if settings.alpha == "anneal" else settings.alpha
        distilled = settings.rationale_weight * rationale + settings.prediction_weight * prediction
        figures |= {"rationale": rationale.detach(), "prediction": prediction.detach()}
        return figures | {"loss": alpha * extraction + (1 - alpha) * distilled}

    def _penalty(self, batch: Batch, mask: Tensor, selectable: Tensor) -> tuple[Tensor, Figures]:
        """This process's part of lambda L_select, and the counts behind it."""
        selection = self.config.selection
        kept = torch.where(selectable, mask, 0.0).sum(dim=1)
        if selection.denominator == "all":
            # the longest input, not the width of this batch: padding must not change the penalty
            features = torch.full_like(kept, self.pair.preprocessor.positions).detach()
        else:
            features = self.selector.backbone.selectable(batch.inputs).sum(dim=1).to(kept.dtype)
        present = float(batch.present > 0)
        sums = {"kept": present * kept.sum(), "features": present * features.sum()}
        on_counts = selection.penalty_on == "counts"
        if selection.penalty_per == "example":
            penalty = batch.share * losses.example_penalty(kept, features, selection.target, on_counts)
        else:
            # what the whole batch keeps, over all processes, is what meets the target
            all_kept, all_features = self.runtime.total(torch.stack([sums["kept"], sums["features"]]))
            examples = batch.examples if on_counts else None
            penalty = losses.batch_penalty(all_kept, all_features, selection.target, examples)
            penalty = self.runtime.shared(penalty)
        return selection.weight * penalty, {name: value.detach() for name, value in sums.items()}

    def _rationale_term(
        self, batch: Batch, logits: Tensor, noise: Tensor, selectable: Tensor, annealed: float
    ) -> Tensor:
        settings = self.config.distillation
        temperature = settings.rationale_temperature or annealed
        positions = logits.shape[1]
        theirs = None
        if settings.noise == "none":
            noise = None
        else:
            theirs = gumbel(self.stream(1, batch.step), batch.indices, positions)
        student = relaxed_log_choice(logits, temperature, noise)
        if settings.hard_labels:
            if theirs is None:
                decisions = self.teacher.mask(batch, positions)
            else:
                decisions = (self.teacher.selector_logits(batch, positions) + theirs).argmax(dim=-1) == 1
            return losses.rationale_imitation(decisions, student, selectable)
        teacher = relaxed_log_choice(self.teacher.selector_logits(batch, positions), temperature, theirs)
        return losses.rationale_distillation(teacher, student, selectable)


class CompactObjective(Objective):
    """The predictor alone on gathered features; the selector and its policy are frozen.

    Args:
        mask: (n, N) bool, the rationale of every training example; None: found anew in each step.
    """

    def __init__(
        self, config: RunConfig, pair: Rationalizer, runtime: Runtime, seed: int, teacher: Teacher | None,
        mask: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(config, pair, runtime, seed, teacher)
        self.predictor, self.mask = pair.predictor, mask

    def figures(self, batch: Batch) -> Figures:
        """Parts of ``loss``."""
        if self.mask is not None:
            mask = self.mask[batch.indices][:, : self.pair.selectable(batch.inputs).shape[1]]
        else:
            with torch.no_grad():
                mask = self.pair.select(batch.inputs).mask
        class_logits = self.pair.gathered_class_logits(batch.inputs, mask)
        return {"loss": batch.share * self.classified(batch, class_logits)}


def _prediction_term(settings: DistillationConfig, theirs: Tensor, ours: Tensor, temperature: float) -> Tensor:
    if settings.hard_labels:
        return losses.prediction_imitation(theirs, ours)
    return losses.prediction_distillation(theirs, ours, temperature)
