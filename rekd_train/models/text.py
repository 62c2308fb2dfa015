"""What families that read token ids share."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from rekd_train.models.base import Backbone, Inputs


class TextBackbone(Backbone):
    """Inputs: ``input_ids`` and ``attention_mask``, int64 (B, N), right-padded, [CLS] at position 0."""

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
