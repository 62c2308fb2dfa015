"""A selector and a predictor with their decision rule: the model that users load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rekd_train.models.base import Inputs, Predictor, Selector
from rekd_train.models.gates import apply_policy, kept_positions, selection_scores
from rekd_train.policy import SelectionPolicy
from rekd_train.prediction import Prediction
from rekd_train.preprocess import TextPreprocessor, check_texts


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
        preprocessor: texts to ``inputs`` and masks back to spans.
        labels: class names, in the order of the logits.
        probability_temperature: softmax temperature fitted on dev (1 = uncalibrated).
    """

    def __init__(
        self,
        selector: Selector,
        predictor: Predictor,
        policy: SelectionPolicy,
        preprocessor: TextPreprocessor,
        labels: Sequence[str],
        probability_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.selector = selector
        self.predictor = predictor
        self.policy = policy
        self.preprocessor = preprocessor
        self.labels = list(labels)
        self.probability_temperature = probability_temperature

    @property
    def capacity(self) -> int:
        """K: most features that a rationale of this model can hold."""
        longest = self.preprocessor.settings.max_length
        specials = len(self.preprocessor.special_ids) - 1  # [PAD] is not part of a text
        return self.policy.capacity(longest if self.policy.selectable == "all" else longest - specials)

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

    def gathered_class_logits(self, inputs: Inputs, mask: Tensor) -> Tensor:
        """As ``class_logits`` for a 'compact' predictor, computed on the kept tokens alone.

        Args:
            mask: (B, N) bool with at most ``capacity`` kept in each row.
        """
        return self.predictor.gathered(inputs, *kept_positions(mask, self.capacity))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C) calibrated probabilities."""
        return torch.softmax(logits / self.probability_temperature, dim=-1)

    @torch.inference_mode()
    def predict(self, texts: Sequence[str], batch_size: int = 64) -> list[Prediction]:
        """Label, probabilities and rationale of each text.

        Raises:
            InputError: an empty list or a text that cannot be used.
        """
        self.eval()
        check_texts(texts)
        predictions: list[Prediction] = []
        device = next(self.parameters()).device
        for start in range(0, len(texts), batch_size):
            encoded = self.preprocessor(texts[start : start + batch_size], first_index=start)
            inputs = {name: torch.from_numpy(array).to(device) for name, array in encoded.inputs.items()}
            selection = self.select(inputs)
            probabilities = self.probabilities(self.class_logits(inputs, selection.mask))
            predictions += encoded.predictions(
                self.labels, *(t.cpu().numpy() for t in (probabilities, selection.mask, selection.scores))
            )
        return predictions
