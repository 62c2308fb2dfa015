"""The state of [CLS] after a BERT encoder, without the work whose outcome nobody reads.

A classifier reads one position. All blocks but the last must compute every position, since the next one
attends to them; the last needs keys and values of all, but query, attention, output and feed-forward of
[CLS] alone. In exact arithmetic nothing changes; a two-layer predictor trains in some two thirds of the time.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.bert.modeling_bert import BertLayer, BertModel


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
