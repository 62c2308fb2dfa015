"""The n-gram family: words with their neighbours, looked up in tables; the cheapest way to read a whole text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError
from rekd_train.models.base import Inputs, TextBackbone, kept_positions, with_cls

_FACTORS = (65_537, 7_919)
"""Primes of the hash; other ones put a trained table's n-grams into other rows."""


class NgramBackbone(TextBackbone):
    """The sum of a word's embedding and those of the pairs and triples that it is part of, beside the text's mean.

    Pairs and triples share a table by a hash of their ids (Joulin et al. 2017, arXiv:1607.01759); an n-gram that no
    text had counts nothing. A state is that sum and, beside it, the sum times what the text's mean says: whether a word
    speaks for what the whole text speaks for. No position has a layer of its own, so a selector over it costs hardly
    more than its head.

    Of kept words alone, neighbours are those in the shorter text.

    Args:
        settings: vocabulary, width (even), buckets (rows of the shared table) and dropout (share of pairs and triples
            that are left out in training) are used.
        special_ids: token ids that are never selectable ([PAD], [CLS], [SEP]).
    """

    def __init__(self, settings: BackboneConfig, special_ids: dict[str, int]) -> None:
        super().__init__()
        if settings.width % 2:
            raise ConfigError(f"family 'ngrams' needs an even width, half for the words, half for the words in the "
                              f"text; it is {settings.width}")  # fmt: skip
        self.settings, self.special_ids = settings, dict(special_ids)
        half = settings.width // 2
        self.embeddings = nn.Embedding(settings.vocabulary, half)
        nn.init.normal_(self.embeddings.weight, std=0.05)
        self.ngrams = nn.Embedding(settings.buckets, half)
        nn.init.zeros_(self.ngrams.weight)
        self.norm = nn.LayerNorm(half)
        self.mean = nn.Linear(half, half)

    @property
    def table(self) -> nn.Embedding:
        return self.embeddings

    def states(self, inputs: Inputs) -> Tensor:
        content, mean = self._read(inputs["input_ids"], inputs["attention_mask"])
        return torch.cat([content, content * self._told(mean)], dim=2)

    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        return self._pooled(inputs["input_ids"], keep * inputs["attention_mask"])

    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        return self.gathered(inputs, *kept_positions(keep, keep.shape[1]))

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        if kept.is_floating_point():
            kept = kept * (kept > 0.5)  # what is not kept is not read, so its gate has no gradient
        kept = kept * (positions > 0)  # a rule that may choose the start token must not show it twice
        visible = torch.cat([torch.ones_like(kept[:, :1]), kept], dim=1)
        return self._pooled(inputs["input_ids"].gather(1, with_cls(positions)), visible)

    def _pooled(self, ids: Tensor, keep: Tensor) -> Tensor:
        """(B, H): the mean of the states."""
        _, mean = self._read(ids, keep)
        return torch.cat([mean, mean * self._told(mean)], dim=2).squeeze(1)

    def _told(self, mean: Tensor) -> Tensor:
        return torch.tanh(self.mean(self.norm(mean)))

    def _read(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, H/2): words with their neighbours, times ``keep`` (B, M), and (B, 1, H/2) their mean."""
        words = self.words(ids)
        keep = keep.to(words.dtype)
        before, after = _neighbours(ids)
        first, second = _neighbours(keep)
        left, right = self._row(before, ids), self._row(ids, after)
        ngrams = first.unsqueeze(-1) * self.ngrams(left) + second.unsqueeze(-1) * self.ngrams(right)
        ngrams = ngrams + (first * second).unsqueeze(-1) * self.ngrams(self._row(left, after))
        if self.training:  # what is left keeps its size, as when the recipe was found
            seen = dropout(torch.ones_like(keep), self.settings.dropout) * (1 - self.settings.dropout)
            ngrams = seen.unsqueeze(-1) * ngrams
        content = words + ngrams
        # a product adds up in one order, however much padding follows; a sum does not
        mean = keep.unsqueeze(1) @ content / keep.sum(dim=1)[:, None, None].clamp(min=1)
        return content * keep.unsqueeze(-1), mean

    def _row(self, first: Tensor, second: Tensor) -> Tensor:
        """Where the table holds an n-gram of these (B, M) ids or rows."""
        return (first * _FACTORS[0] + second * _FACTORS[1]) % self.settings.buckets


def _neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M) each: what stands before and after, 0 where nothing does; ONNX Runtime pads no int64 on a GPU."""
    nothing = torch.zeros_like(values[:, :1])
    return torch.cat([nothing, values[:, :-1]], dim=1), torch.cat([values[:, 1:], nothing], dim=1)
