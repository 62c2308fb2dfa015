"""The BERT family: selector and predictor backbones over transformers' ``BertModel``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.bert.modeling_bert import BertConfig, BertLayer, BertModel

from rekd_train.config.run import BackboneConfig
from rekd_train.models.base import Inputs, TextBackbone, with_cls


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
        return self._first(self.words(inputs["input_ids"]), visible.to(torch.int64))

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
    """(B, 1, 1, N) bool from (B, N)."""
    return attention_mask[:, None, None, :] > 0


def first_state(bert: BertModel, content: Tensor, attention_mask: Tensor, positions: Tensor | None) -> Tensor:
    """(B, H): last hidden state of position 0.

    Args:
        content: (B, M, H) word embeddings.
        attention_mask: (B, 1, 1, M), bool (may be attended) or float (added to the scores).
        positions: (B, M) int64 position ids; None: 0 .. M - 1.
    """
    hidden = bert.embeddings(inputs_embeds=content, position_ids=positions)
    *blocks, last = bert.encoder.layer
    for block in blocks:
        hidden = block(hidden, attention_mask)
    return _first_of_block(last, hidden, attention_mask)[:, 0]


def _first_of_block(block: BertLayer, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, 1, H) from (B, M, H)."""
    attention = block.attention.self
    shape = (hidden.shape[0], -1, attention.num_attention_heads, attention.attention_head_size)
    first = hidden[:, :1]
    query, key, value = (
        part(states).view(shape).transpose(1, 2)
        for part, states in ((attention.query, first), (attention.key, hidden), (attention.value, hidden))
    )
    dropout = attention.dropout.p if attention.training else 0.0
    context = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
    attended = block.attention.output(context.transpose(1, 2).flatten(2), first)
    return block.output(block.intermediate(attended), attended)
