"""A selector and a predictor with their decision rule: the model that users load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.preprocessors import Preprocessor, full_length
from rekd_train.models.base import Inputs, Predictor, Selector, apply_policy, kept_positions, selection_scores


class Selection(NamedTuple):
    """A noise-free rationale."""

    scores: Tensor
    """(B, N) float32, z1 - z0."""
    mask: Tensor
    """(B, N) bool."""


class Rationalizer(nn.Module):
    """A pair that classifies from its own rationale.

    Args:
        selector: scores features.
        predictor: classifies from kept features.
        policy: from scores to the mask.
        preprocessor: texts or images to ``inputs`` and masks back to spans or patches.
        labels: class names, in the order of the logits.
        probability_temperature: softmax temperature fitted on dev (1 = uncalibrated).

    ConfigError: the preprocessing does not fit the networks.
    """

    def __init__(
        self, selector: Selector, predictor: Predictor, policy: SelectionPolicy, preprocessor: Preprocessor,
        labels: Sequence[str], probability_temperature: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        for model in (selector, predictor):
            preprocessor.check_backbone(model.backbone.settings)
        self.selector, self.predictor = selector, predictor
        self.policy, self.preprocessor, self.labels = policy, preprocessor, list(labels)
        self.probability_temperature = probability_temperature

    @property
    def capacity(self) -> int:
        """K: most features that a rationale of this model can hold."""
        return self.capacity_under(self.policy)

    def capacity_under(self, policy: SelectionPolicy) -> int:
        """K if another policy were stored."""
        sizes = self.preprocessor
        return policy.capacity(sizes.positions if policy.selectable == "all" else sizes.features)

    def selectable(self, inputs: Inputs) -> Tensor:
        """(B, N) bool: what the policy may choose from."""
        own = self.selector.backbone.selectable(inputs)
        return torch.ones_like(own) if self.policy.selectable == "all" else own

    def selector_logits(self, inputs: Inputs) -> Tensor:
        """(B, N, 2) float32; index 1 = select."""
        return self.selector(inputs)

    def select(self, inputs: Inputs) -> Selection:
        """The noise-free rationale by the stored policy."""
        scores = selection_scores(self.selector_logits(inputs))
        return Selection(scores, apply_policy(scores, self.selectable(inputs), self.policy, self.capacity))

    def class_logits(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """(B, C) float32 logits of the predictor.

        Args:
            mask: (B, N), kept features; None: every selectable feature.
        """
        selectable = self.selectable(inputs)
        return self.predictor(inputs, selectable if mask is None else mask, selectable)

    def gathered_class_logits(self, inputs: Inputs, mask: Tensor, slots: int | None = None) -> Tensor:
        """As ``class_logits`` for a 'compact' predictor, computed on the kept features alone.

        Args:
            mask: (B, N) bool.
            slots: at least as many as the fullest row of ``mask`` keeps; None: ``capacity``.
        """
        return self.predictor.gathered(inputs, *kept_positions(mask, slots or self.capacity))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C) calibrated probabilities."""
        return torch.softmax(logits / self.probability_temperature, dim=-1)

    @torch.inference_mode()
    def predict(self, items: Sequence[Any], batch_size: int = 64) -> list[Prediction]:
        """Label, probabilities and rationale of each item.

        Args:
            items: texts (str); for a vision model images: uint8 arrays (H, W, C), Pillow images or paths.

        InputError: an empty list or an item that cannot be used.
        """
        self.eval()
        items = self.preprocessor.check_items(items)
        predictions: list[Prediction] = []
        device = next(self.parameters()).device
        for start in range(0, len(items), batch_size):
            encoded = self.preprocessor(items[start : start + batch_size], first_index=start)
            arrays = encoded.inputs
            if self.policy.selectable == "all":
                arrays = full_length(arrays, self.preprocessor)
            inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            selection = self.select(inputs)
            probabilities = self.probabilities(self.class_logits(inputs, selection.mask))
            predictions += encoded.predictions(
                self.labels, *(t.cpu().numpy() for t in (probabilities, selection.mask, selection.scores))
            )
        return predictions
