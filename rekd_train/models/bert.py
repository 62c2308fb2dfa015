"""The BERT family: selector and predictor backbones over transformers' ``BertModel``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertConfig, BertModel

from rekd_train.config.run import BackboneConfig
from rekd_train.models.base import Inputs, log_weights
from rekd_train.models.bert_pooling import first_state
from rekd_train.models.text import TextBackbone, with_cls


class BertBackbone(TextBackbone):
    """Words through a BERT encoder.

    Inputs: ``input_ids`` and ``attention_mask``, int64 (B, N), right-padded, [CLS] at position 0.
    Kept tokens keep their original position embeddings. With the operator 'compact' the predictor sees
    [CLS] and the kept tokens and nothing else, not even [SEP], whose place would tell the length.

    Args:
        settings: sizes.
        special_ids: token ids that are never selectable ([PAD], [CLS], [SEP]).
    """

    def __init__(self, settings: BackboneConfig, special_ids: dict[str, int]) -> None:
        super().__init__()
        self.settings = settings
        self.special_ids = dict(special_ids)
        config = BertConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=settings.feedforward,
            max_position_embeddings=settings.positions,
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=settings.attention_dropout,
            layer_norm_eps=settings.layer_norm_eps,
            pad_token_id=special_ids["pad"],
        )
        config._attn_implementation = "sdpa"
        self.bert = BertModel(config, add_pooling_layer=False)

    @property
    def table(self) -> nn.Embedding:
        return self.bert.embeddings.word_embeddings

    def states(self, inputs: Inputs) -> Tensor:
        return self._encode(self.words(inputs["input_ids"]), inputs["attention_mask"])

    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        words = self.words(inputs["input_ids"])
        keep = keep if keep.dtype == words.dtype else keep.to(words.dtype)  # a product with float32 would be float32
        content = words * keep.unsqueeze(-1)
        return self._first(content, inputs["attention_mask"])

    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        visible = torch.cat([torch.ones_like(keep[:, :1]), keep[:, 1:]], dim=1)
        words = self.words(inputs["input_ids"])
        if visible.is_floating_point():
            return self._first(words, log_weights(visible))
        return self._first(words, visible.to(torch.int64))

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        places = with_cls(positions)
        kept = kept & (positions > 0)  # a rule that may choose [CLS] must not show it twice
        visible = torch.cat([torch.ones_like(positions[:, :1]), kept.to(torch.int64)], dim=1)
        content = self.words(inputs["input_ids"].gather(1, places))
        return self._first(content, visible, places)

    def _first(self, content: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, H): the state of [CLS], which a predictor reads."""
        if torch.compiler.is_exporting():  # whole blocks are what ONNX Runtime's fusions know
            return self._encode(content, attention_mask, positions)[:, 0]
        return first_state(self.bert, content, _visible(attention_mask), positions)

    def _encode(self, content: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_exporting():
            # taken as it is; given (B, N), BertModel asks whether everything is visible and waits for the GPU
            attention_mask = _visible(attention_mask)
        return self.bert(
            inputs_embeds=content, attention_mask=attention_mask, position_ids=positions
        ).last_hidden_state


def _visible(attention_mask: Tensor) -> Tensor:
    """(B, 1, 1, N) bool from (B, N); what has four axes already is kept."""
    return attention_mask[:, None, None, :] > 0 if attention_mask.ndim == 2 else attention_mask
