"""The two steps as modules that can be exported: positional tensors in, named tensors out.

Everything that decides an answer is inside: the decision rule in the selector's graph, the temperature of
the probabilities in the predictor's. Inputs and outputs follow ``rekd_deploy.signature`` in order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rekd_deploy.errors import ExportError
from rekd_train.models.families import FAMILIES
from rekd_train.models.gates import apply_policy, kept_positions, selection_scores
from rekd_train.models.rationalizer import Rationalizer


class SelectorGraph(nn.Module):
    """Tokens -> the noise-free rationale.

    Args:
        rationalizer: its selector, policy and capacity K are taken, not copied.
    """

    def __init__(self, rationalizer: Rationalizer) -> None:
        super().__init__()
        self.selector = rationalizer.selector
        self.policy = rationalizer.policy
        self.capacity = rationalizer.capacity

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores (B, N) float32, mask (B, N) bool, positions (B, K) int64, kept (B, K) bool.

        Args:
            input_ids: (B, N) int64, right-padded.
            attention_mask: (B, N) int64, 1 for real tokens.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        scores = selection_scores(self.selector(inputs))
        selectable = self.selector.backbone.selectable(inputs)
        if self.policy.selectable == "all":
            selectable = torch.ones_like(selectable)
        mask = apply_policy(scores, selectable, self.policy, self.capacity)
        positions, kept = kept_positions(mask, self.capacity)
        return scores, mask, positions, kept


class CompactPredictorGraph(nn.Module):
    """Kept tokens -> classes; tokens that are not kept never enter the computation.

    Args:
        rationalizer: its predictor and probability temperature are taken, not copied.

    Raises:
        ExportError: the predictor was not trained to be served by gathering.
    """

    def __init__(self, rationalizer: Rationalizer) -> None:
        super().__init__()
        predictor = rationalizer.predictor
        if predictor.operator != "compact":
            raise ExportError(
                f"the predictor was trained with the operator '{predictor.operator}' and is exported only with "
                "'compact': served by gathering it would answer differently; fix: run `rekd-train compact` on this "
                "checkpoint and export the result"
            )
        family = predictor.backbone.settings.family
        if not FAMILIES[family].gathering_is_masking:
            raise ExportError(f"in the family '{family}' gathering is not masking; it cannot be served compacted")
        self.predictor = predictor
        self.temperature = float(rationalizer.probability_temperature)

    def forward(self, input_ids: Tensor, positions: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) float32, calibrated probabilities (B, C) float32.

        Args:
            input_ids: (B, N) int64.
            positions: (B, K) int64, kept positions in ascending order, 0 in unused slots.
            kept: (B, K) bool, whether a slot is used.
        """
        logits = self.predictor.gathered({"input_ids": input_ids}, positions, kept)
        return logits, torch.softmax(logits / self.temperature, dim=-1)
