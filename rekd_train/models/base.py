"""What a neural-model family provides, and the two models built on it.

A *backbone* reads features (words, patches). The *selector* scores each feature; the *predictor*
classifies from the kept features alone. Both are final classes over any backbone: a family is added by
writing one backbone and registering it in ``FAMILIES``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError

Inputs = dict[str, Tensor]
Operator = Literal["zero", "compact"]


class Backbone(nn.Module, ABC):
    """Features of one family. B = batch, N = positions, K = kept slots, H = width."""

    settings: BackboneConfig

    modality: Literal["text", "image"]
    """Which preprocessing its inputs come from."""

    operators: tuple[str, ...] = ("zero", "compact")
    """What a predictor over it can do with the features that are not kept."""

    @property
    def columns(self) -> int | None:
        """Features in each row of a grid, that of the patches of an image; None: they are one line."""
        return None if self.settings.image is None else self.settings.image.grid[1]

    @abstractmethod
    def real(self, inputs: Inputs) -> Tensor:
        """(B, N) bool: positions that hold anything, padding excluded."""

    @abstractmethod
    def selectable(self, inputs: Inputs) -> Tensor:
        """(B, N) bool: features that a rationale may hold: no padding, no special token."""

    @abstractmethod
    def states(self, inputs: Inputs) -> Tensor:
        """(B, N, H): contextual state of every position, which the selector reads."""

    @abstractmethod
    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        """(B, H): pooled state with the content of each position times ``keep`` (B, N) float.

        The paper's operator: blank positions are still attended. Differentiable in ``keep``.
        """

    @abstractmethod
    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        """(B, H): pooled state when only the positions in ``keep`` (B, N) bool exist; static shape."""

    @abstractmethod
    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        """(B, H): as ``attended``, computed on ``positions`` (B, K) int64 alone; ``kept`` (B, K) bool."""


class TextBackbone(Backbone):
    """Inputs: ``input_ids`` and ``attention_mask``, int64 (B, N), right-padded, [CLS] at position 0."""

    modality = "text"
    special_ids: dict[str, int]
    """Token ids that are never selectable ([PAD], [CLS], [SEP])."""

    @property
    @abstractmethod
    def table(self) -> nn.Embedding:
        """The word embeddings."""

    def real(self, inputs: Inputs) -> Tensor:
        return inputs["attention_mask"] > 0

    def selectable(self, inputs: Inputs) -> Tensor:
        mask = self.real(inputs)
        for token_id in self.special_ids.values():
            mask = mask & (inputs["input_ids"] != token_id)
        return mask

    def words(self, input_ids: Tensor) -> Tensor:
        """(B, M, H) word embeddings, no position added."""
        return self.table(input_ids)

    def load_word_embeddings(self, table: Tensor) -> None:
        """Start from a (vocabulary, width) table."""
        with torch.no_grad():
            self.table.weight.copy_(table)


def with_cls(positions: Tensor) -> Tensor:
    """(B, 1 + K): the positions (B, K) behind that of [CLS], 0; joined, since ONNX Runtime pads no int64 on a GPU."""
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


class Selector(nn.Module):
    """Scores features: (B, N, 2) logits, index 1 = select (REKD sec. 3.1)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        settings = backbone.settings
        if settings.head_width:
            self.head = nn.Sequential(
                nn.Linear(settings.width, settings.head_width),
                nn.ReLU(),
                nn.Dropout(settings.head_dropout),
                nn.Linear(settings.head_width, 2),
            )
        else:
            self.head = nn.Sequential(nn.Dropout(settings.head_dropout), nn.Linear(settings.width, 2))
        for module in self.head:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Inputs) -> Tensor:
        """(B, N, 2) float32 logits."""
        return self.head(self.backbone.states(inputs)).float()


class Predictor(nn.Module):
    """Classifies from kept features. ``operator`` says how the others are removed.

    'zero' is the paper's: their content is zeroed, their slots are attended. 'compact' removes them
    from the computation; it is served by gathering. A predictor is served as it was trained.
    """

    def __init__(self, backbone: Backbone, classes: int, operator: Operator = "zero") -> None:
        super().__init__()
        self.backbone = backbone
        self.use(operator)
        self.head = nn.Sequential(
            nn.Dropout(backbone.settings.head_dropout), nn.Linear(backbone.settings.width, classes)
        )
        if backbone.settings.class_head == "xavier":
            nn.init.xavier_uniform_(self.head[1].weight)
            nn.init.zeros_(self.head[1].bias)

    def use(self, operator: Operator) -> None:
        """Remove features by that operator from now on; ConfigError: the backbone cannot."""
        if operator not in self.backbone.operators:
            known = ", ".join(self.backbone.operators)
            raise ConfigError(f"operator is {operator!r}; operators of this backbone: {known}")
        self.operator: Operator = operator

    def forward(self, inputs: Inputs, keep: Tensor, selectable: Tensor | None = None) -> Tensor:
        """(B, C) float32 logits.

        Args:
            keep: (B, N); selectable positions not kept are removed. Float (may carry a gradient) with
                the operator 'zero', bool or float with 'compact'.
            selectable: (B, N) bool, what ``keep`` decides about; None: the backbone's own. Real positions
                outside it keep their content with 'zero' and are not seen with 'compact'.
        """
        if selectable is None:
            selectable = self.backbone.selectable(inputs)
        if self.operator == "compact":
            return self.head(self.backbone.attended(inputs, selectable & (keep > 0.5))).float()
        fixed = self.backbone.real(inputs).float()
        return self.head(self.backbone.zeroed(inputs, torch.where(selectable, keep.float(), fixed))).float()

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        """(B, C) float32 logits from the kept positions alone; equals 'compact' on the same mask."""
        return self.head(self.backbone.gathered(inputs, positions, kept)).float()
