"""A backbone of your own: word embeddings through a few convolutions. The contract: docs/adding_a_family.md.

    PYTHONPATH=examples rekd-train run equal_student --trust-code --output runs/own \\
        --set selector.family=own_backbone:Convolutions --set predictor.family=own_backbone:Convolutions \\
        --set predictor.options.kernel=5
    PYTHONPATH=examples rekd-export runs/own --trust-code    # what is served needs neither this file nor torch
"""

import torch
from torch import nn

from rekd_train.errors import ConfigError
from rekd_train.models.base import TextBackbone, gated, kept_positions, with_cls


class Convolutions(TextBackbone):
    """``settings.layers`` convolutions of ``settings.width`` channels over ``settings.options["kernel"]`` words."""

    def __init__(self, settings, special_ids):
        super().__init__()
        kernel = settings.options.get("kernel", 3)
        if kernel % 2 == 0:
            raise ConfigError(f"options.kernel is {kernel}; it must be odd, so that each word has its place")
        self.settings, self.special_ids = settings, dict(special_ids)
        self.embeddings = nn.Embedding(settings.vocabulary, settings.width)
        nn.init.normal_(self.embeddings.weight, std=0.1)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(settings.width, settings.width, kernel, padding=kernel // 2) for _ in range(settings.layers)
        )

    @property
    def table(self):
        return self.embeddings

    def states(self, inputs):
        return self.read(self.words(inputs["input_ids"]), inputs["attention_mask"])

    def zeroed(self, inputs, keep):
        return self.pooled(self.words(inputs["input_ids"]) * keep.unsqueeze(-1), inputs["attention_mask"])

    def attended(self, inputs, keep):  # by the same steps as when it is served: the kept words as one shorter text
        return self.gathered(inputs, *kept_positions(keep, keep.shape[1]))

    def gathered(self, inputs, positions, kept):
        words, kept = gated(self.words(inputs["input_ids"].gather(1, with_cls(positions))), kept)
        visible = torch.cat([torch.ones_like(kept[:, :1]), kept & (positions > 0)], dim=1)  # [CLS] in front, once
        return self.pooled(words, visible)

    def read(self, content, visible):
        """(B, M, H) states; what is not visible (B, M) is 0 before each layer, as beyond the ends of a text."""
        for convolution in self.convolutions:
            content = content * visible.unsqueeze(-1).to(content.dtype)
            content = content + torch.relu(convolution(content.transpose(1, 2)).transpose(1, 2))
        return content

    def pooled(self, content, visible):
        weights = visible.unsqueeze(-1).to(content.dtype)
        return (self.read(content, visible) * weights).sum(1) / weights.sum(1)
