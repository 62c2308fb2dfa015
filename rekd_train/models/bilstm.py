"""The BiLSTM family: words through a bidirectional LSTM, small and without attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError
from rekd_train.models.base import Inputs, TextBackbone, gated, with_cls


class BilstmBackbone(TextBackbone):
    """Word embeddings through ``settings.layers`` pairs of LSTMs, one in each direction.

    The backward LSTM reads each text reversed within its own length, so padding never changes an answer.
    An LSTM steps over blank words, so words masked in place are not words left out: 'compact' reads
    [CLS] and the kept words as one shorter text, in training as when served.

    Args:
        settings: vocabulary, width (even), layers and dropout are used.
        special_ids: token ids that are never selectable ([PAD], [CLS], [SEP]).
    """

    def __init__(self, settings: BackboneConfig, special_ids: dict[str, int]) -> None:
        super().__init__()
        if settings.width % 2:
            raise ConfigError(f"family 'bilstm' needs an even width, half for each direction; it is {settings.width}")
        self.settings = settings
        self.special_ids = dict(special_ids)
        self.embeddings = nn.Embedding(settings.vocabulary, settings.width)
        nn.init.normal_(self.embeddings.weight, std=0.1)
        size = (settings.width, settings.width // 2)
        self.onward = nn.ModuleList(nn.LSTM(*size, batch_first=True) for _ in range(settings.layers))
        self.backward = nn.ModuleList(nn.LSTM(*size, batch_first=True) for _ in range(settings.layers))
        self.dropout = nn.Dropout(settings.dropout)

    @property
    def table(self) -> nn.Embedding:
        return self.embeddings

    def states(self, inputs: Inputs) -> Tensor:
        return self._read(self.words(inputs["input_ids"]), inputs["attention_mask"].sum(dim=1, keepdim=True))

    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        lengths = inputs["attention_mask"].sum(dim=1, keepdim=True)
        return _ends(self._read(self.words(inputs["input_ids"]) * keep.unsqueeze(-1), lengths), lengths)

    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        first_kept = (~keep[:, 1:]).to(torch.int64).argsort(dim=1, stable=True) + 1
        return self.gathered(inputs, first_kept, keep[:, 1:].sort(dim=1, descending=True).values)

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        words, kept = gated(self.words(inputs["input_ids"].gather(1, with_cls(positions))), kept)
        lengths = 1 + kept.to(torch.int64).sum(dim=1, keepdim=True)
        return _ends(self._read(words, lengths), lengths)

    def _read(self, content: Tensor, lengths: Tensor) -> Tensor:
        """(B, M, H) states; those at and behind ``lengths`` (B, 1) are of no meaning and reach no other."""
        steps = torch.arange(content.shape[1], device=content.device).expand(content.shape[0], -1)
        turned = (lengths - 1 - steps).clamp(min=0)
        for onward, backward in zip(self.onward, self.backward, strict=True):
            content = self.dropout(content)
            # the onward states are taken by index, too: torch.export would fix the length that an LSTM returns
            states = _at(onward(content)[0], steps), _at(backward(_at(content, turned))[0], turned)
            content = torch.cat(states, dim=2)
        return content


def _at(values: Tensor, places: Tensor) -> Tensor:
    """(B, M, D): the rows of ``values`` (B, L, D) at ``places`` (B, M)."""
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[2]))


def _ends(states: Tensor, lengths: Tensor) -> Tensor:
    """(B, H): what each direction holds when it has read everything."""
    half = states.shape[2] // 2
    return torch.cat([_at(states[:, :, :half], lengths - 1)[:, 0], states[:, 0, half:]], dim=1)
