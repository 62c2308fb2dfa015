"""How a selector that gathered features will train learns what to keep: by what single features say of the class.

Votes are learnt on random features, never on what the selector prefers: it knows the class, and the two would agree on
a code in which words say what they do not mean (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rekd_train.models.base import apply_policy
from rekd_train.training.objectives import QUIET_TEMPERATURE, Figures, Objective, penalised
from rekd_train.training.runtime import Batch
from rekd_train.training.validation import base_policy


class VoteObjective(Objective):
    """A selector learns which words tell the class before there is a predictor to tell it: its gates weigh their votes.

    Each position votes by itself, without its context, so that what is weighed is what a predictor will read. The
    class must follow from the mean of the votes, each weighed by its chance to be kept, under the penalty on the mean
    chance: the game of the rationale stage with expectations in place of draws. The selector's states learn the class,
    too. A teacher, if one is given, tells both the class and what to keep. ``stages.operator = "gather"`` needs such
    a start: gathered words have a gradient at what is kept alone, and what a fresh selector keeps says nothing
    (docs/training.md).

    Args:
        votes: from (B, N, H) content to (B, N, C) logits; thrown away.
        reader: from (B, H) mean states to (B, C) logits; thrown away.
    """

    trains_selector, trains_predictor = True, False

    def __init__(self, *given: Any, votes: nn.Module, reader: nn.Module) -> None:
        super().__init__(*given)
        self.votes, self.reader = votes, reader

    def figures(self, batch: Batch) -> Figures:
        """Parts of ``loss``; ``penalty``, and the counts behind it."""
        backbone, selectable = self.selector.backbone, self.pair.selectable(batch.inputs)
        states = backbone.states(batch.inputs)
        logits = self.selector.head(states).float()
        chances = torch.where(selectable, logits.softmax(dim=-1)[..., 1], 0.0)
        penalty, figures = penalised(self, batch, chances, selectable)
        votes = self.votes(backbone.content(batch.inputs)).float()
        drawn = selectable.float() * self.random_mask(batch, selectable.shape[1])
        loss = penalty
        settings = self.config.distillation
        if self.teacher is not None and settings.rationale_weight and settings.alpha != 1.0:
            term = batch.share * self.rationale_term(batch, logits, None, selectable, QUIET_TEMPERATURE)
            loss, figures = loss + settings.rationale_weight * term, figures | {"rationale": term.detach()}
        for class_logits in (
            mean_over(votes.detach(), chances), mean_over(votes, drawn),
            self.reader(mean_over(states, selectable.float())).float(),
        ):  # fmt: skip
            loss = loss + batch.share * self.classified(batch, class_logits)
        return figures | {"loss": loss, "penalty": penalty.detach()}


class EvidenceObjective(Objective):
    """A head over a classifier's states learns which features speak most for the class of the whole input.

    Each position votes by itself, as in ``VoteObjective``; of each example the share to keep whose votes are most for
    its class is to be found, by the positions' states in the whole input. The network below, which came from a
    classifier and so knows what the class will be, stays as it is: a head alone learns, at a third of the cost. The
    class is the label, where there is none the teacher's.

    Args:
        votes: from (B, N, H) content to (B, N, C) logits; thrown away.
    """

    trains_predictor = False

    def __init__(self, *given: Any, votes: nn.Module) -> None:
        super().__init__(*given)
        self.head, self.votes = self.pair.selector.head, votes

    def figures(self, batch: Batch) -> Figures:
        """Parts of ``loss``; ``evidence``, and the counts behind the share that is kept."""
        backbone, selectable = self.pair.selector.backbone, self.pair.selectable(batch.inputs)
        with torch.no_grad():
            states, content = backbone.states(batch.inputs), backbone.content(batch.inputs)
        votes, logits = self.votes(content).float(), self.head(states).float()
        drawn = selectable.float() * self.random_mask(batch, selectable.shape[1])
        voted = self.classified(batch, mean_over(votes, drawn))

        classes, weights = batch.labels, batch.weights
        if self.teacher is not None and weights is not None:  # some have no label
            theirs, known = self.teacher.class_logits(batch).argmax(dim=-1), self.teacher.known_classes(batch)
            classes = torch.where(weights > 0, classes, theirs)
            told = torch.ones_like(weights) if known is None else known.float()
            weights = torch.where(weights > 0, weights, told)
        speaks = votes.detach().log_softmax(dim=-1)
        speaks = speaks.gather(2, classes[:, None, None].expand(-1, speaks.shape[1], 1)).squeeze(2)
        policy = base_policy(self.config.selection).model_copy(
            update={"bias": None, "budget": self.config.selection.target}
        )
        best = apply_policy(speaks, selectable, policy, policy.capacity(speaks.shape[1]))
        chances = logits.log_softmax(dim=-1)
        surprise = torch.where(selectable, -torch.where(best, chances[..., 1], chances[..., 0]), 0.0)
        each = surprise.sum(dim=1) / selectable.sum(dim=1).clamp(min=1)
        evidence = batch.share * (each if weights is None else weights * each).mean()
        _, counts = penalised(self, batch, chances[..., 1].exp().detach(), selectable)
        return counts | {"loss": evidence + batch.share * voted, "evidence": evidence.detach()}


def mean_over(values: Tensor, weights: Tensor) -> Tensor:
    """(B, D): the mean of (B, N, D) by (B, N) weights."""
    return (values * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
