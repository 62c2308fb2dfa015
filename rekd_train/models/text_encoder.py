"""Any text encoder of ``transformers`` that takes embeddings, as the backbone of a selector or predictor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, PretrainedConfig
from transformers.models.bert.modeling_bert import BertLayer, BertModel

from rekd_train.config.run import BackboneConfig
from rekd_train.models.base import Inputs, TextBackbone, with_cls
from rekd_train.models.encoder_traits import BERT_TRAITS, build_encoder, expanded, last_states, probed
from rekd_train.models.gates import kept_positions

DROPOUTS = {
    "dropout": ("hidden_dropout_prob", "hidden_dropout", "dropout", "embedding_dropout", "mlp_dropout"),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout"),
}
"""What the library's configurations call ours."""


class TextEncoder(TextBackbone):
    """Words through an encoder of ``transformers``, built from the library's own configuration.

    Inputs: ``input_ids`` and ``attention_mask``, int64 (B, N), right-padded, the start token at position 0. Kept tokens
    keep their original positions. With the operator 'compact' the predictor sees the start token and the kept tokens
    and nothing else, not even the end token, whose place would tell the length. Where an encoder counts distance by
    slot instead of by position, its compact input is defined as the packed sequence (``traits.gathering``).

    Args:
        settings: ``architecture``, the library's configuration; empty: a BERT of the sizes given. ``traits`` that are
            not recorded yet are probed.
        special_ids: token ids that are never selectable; 'pad' is BERT's padding.

    Raises:
        ConfigError: an encoder that cannot be a backbone; the message says why.
    """

    def __init__(self, settings: BackboneConfig, special_ids: dict[str, int]) -> None:
        super().__init__()
        self.special_ids = dict(special_ids)
        config = _library_config(settings, special_ids)
        traits = settings.traits or (probed(config) if settings.architecture else BERT_TRAITS)
        self.settings = settings.model_copy(update={"traits": traits if settings.architecture else None})
        self.traits = traits
        self.model = build_encoder(config)

    @property
    def table(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def states(self, inputs: Inputs) -> Tensor:
        return last_states(self.model, self.traits, self.words(inputs["input_ids"]), inputs["attention_mask"])

    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        words = self.words(inputs["input_ids"])
        keep = keep if keep.dtype == words.dtype else keep.to(words.dtype)  # a product with float32 would be float32
        return self._pooled(words * keep.unsqueeze(-1), inputs["attention_mask"])

    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        if self.traits.gathering == "packed":
            return self.gathered(inputs, *kept_positions(keep, keep.shape[1]))
        visible = torch.cat([torch.ones_like(keep[:, :1]), keep[:, 1:]], dim=1)
        return self._pooled(self.words(inputs["input_ids"]), visible.to(torch.int64))

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        indices = with_cls(positions)
        kept = kept & (positions > 0)  # a rule that may choose the start token must not show it twice
        visible = torch.cat([torch.ones_like(positions[:, :1]), kept.to(torch.int64)], dim=1)
        return self._pooled(self.words(inputs["input_ids"].gather(1, indices)), visible, indices)

    def _pooled(self, content: Tensor, visible: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, H): what a predictor reads, the state of the start token or the mean over what is visible."""
        if self.settings.pooling == "mean":
            weights = visible.to(content.dtype).unsqueeze(-1)
            states = last_states(self.model, self.traits, content, visible, positions)
            return (states * weights).sum(1) / weights.sum(1)
        if isinstance(self.model, BertModel) and not torch.compiler.is_exporting():
            return _first_state(self.model, content, expanded(visible), positions)
        return last_states(self.model, self.traits, content, visible, positions)[:, 0]


def _library_config(settings: BackboneConfig, special_ids: dict[str, int]) -> PretrainedConfig:
    if settings.architecture:
        config = AutoConfig.for_model(**settings.architecture)
    else:
        config = AutoConfig.for_model(
            "bert", vocab_size=settings.vocabulary, hidden_size=settings.width, num_attention_heads=settings.heads,
            intermediate_size=settings.feedforward, max_position_embeddings=settings.positions,
            layer_norm_eps=settings.layer_norm_eps, pad_token_id=special_ids["pad"],
        )  # fmt: skip
    config.num_hidden_layers = settings.layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: settings.layers]
    for ours, theirs in DROPOUTS.items():
        for name in theirs:
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, getattr(settings, ours))
    return config


def stored_config(config: PretrainedConfig) -> dict[str, Any]:
    """A library's configuration as a checkpoint stores it: what it computes, not where it comes from."""
    outside = {"transformers_version", "_name_or_path", "dtype", "architectures", "id2label", "label2id"}
    return {name: value for name, value in config.to_diff_dict().items() if name not in outside}


def _first_state(bert: BertModel, content: Tensor, attention_mask: Tensor, positions: Tensor | None) -> Tensor:
    """(B, H): last hidden state of position 0; the last block computes no other.

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
