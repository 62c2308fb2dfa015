"""Any text encoder of ``transformers`` that takes embeddings, as the backbone of a selector or predictor.

How a kind of encoder counts positions and masks is found by a probe, so that no list of names is kept.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import BertModel

from rekd_train.config.sections import BackboneConfig, EncoderTraits
from rekd_train.errors import ConfigError
from rekd_train.models.base import Inputs, TextBackbone, gated, kept_positions, with_cls

DROPOUTS = {
    "dropout": ("hidden_dropout_prob", "hidden_dropout", "dropout", "embedding_dropout", "mlp_dropout"),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout"),
}
"""What the library's configurations call ours."""


class TextEncoder(TextBackbone):
    """Words through an encoder of ``transformers``, built from the library's own configuration.

    Kept tokens keep their original positions. With the operator 'compact' the predictor sees the start token and the
    kept tokens and nothing else, not even the end token, whose place would tell the length. Where an encoder counts
    distance by slot instead of by position, its compact input is defined as the packed sequence (``traits.gathering``).

    Args:
        settings: ``architecture``, the library's configuration; empty: a BERT of the sizes given. ``traits`` that are
            not recorded yet are probed.
        special_ids: token ids that are never selectable; 'pad' is BERT's padding.

    ConfigError: an encoder that cannot be a backbone; the message says why.
    """

    def __init__(self, settings: BackboneConfig, special_ids: dict[str, int]) -> None:
        super().__init__()
        self.special_ids = dict(special_ids)
        config = _library_config(settings, special_ids)
        traits = settings.traits or (probed(config) if settings.architecture else BERT_TRAITS)
        self.settings = settings.model_copy(update={"traits": traits if settings.architecture else None})
        self.traits, self.model = traits, build_encoder(config)

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
        words, kept = gated(self.words(inputs["input_ids"].gather(1, indices)), kept)
        kept = kept & (positions > 0)  # a rule that may choose the start token must not show it twice
        visible = torch.cat([torch.ones_like(positions[:, :1]), kept.to(torch.int64)], dim=1)
        return self._pooled(words, visible, indices)

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
    attention = last.attention.self
    shape = (hidden.shape[0], -1, attention.num_attention_heads, attention.attention_head_size)
    first = hidden[:, :1]
    query, key, value = (
        part(states).view(shape).transpose(1, 2)
        for part, states in ((attention.query, first), (attention.key, hidden), (attention.value, hidden))
    )
    dropout = attention.dropout.p if attention.training else 0.0
    context = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
    attended = last.attention.output(context.transpose(1, 2).flatten(2), first)
    return last.output(last.intermediate(attended), attended)[:, 0]


# traits

BERT_TRAITS = EncoderTraits(first_position=0, expanded_masks=True, gathering="exact")
"""Of a BERT, which needs no probe when it is made from sizes."""
_LENGTH = 320
"""Tokens of the probe: longer than any local attention or bucket of distances in use reaches to one side."""
_TOLERANCE = 2e-4
"""Largest difference, relative to the size of the states, that rounding explains."""


def build_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """A randomly initialised encoder, without a pooler where it can be left out.

    ConfigError: transformers has none of that type, or the sizes contradict each other.
    """
    try:
        model_class = AutoModel._model_mapping[type(config)]  # from_config does not say which class it will take
        options = {"add_pooling_layer": False} if "add_pooling_layer" in _parameters(model_class.__init__) else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModel.from_config(config, **options)
    except KeyError:
        raise ConfigError(f"transformers has no encoder of the type '{config.model_type}'") from None
    except (ValueError, AssertionError, RuntimeError, ImportError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the encoder of the type '{config.model_type}' cannot be built: {reason}") from None


def last_states(
    model: PreTrainedModel, traits: EncoderTraits, content: Tensor, visible: Tensor, positions: Tensor | None = None
) -> Tensor:
    """(B, M, H): the encoder's last hidden states.

    Args:
        content: (B, M, H') word embeddings.
        visible: (B, M) int64, 1 for what may be attended.
        positions: (B, M) int64, places in the whole text of tokens that were gathered; None: these are all.
    """
    mask: Any = visible
    if positions is not None and traits.gathering == "windowed":
        near = (positions[:, :, None] - positions[:, None, :]).abs() <= model.config.sliding_window
        whole = expanded(visible).expand(-1, -1, positions.shape[1], -1)
        mask = {"full_attention": whole, "sliding_attention": whole & near.unsqueeze(1)}
    elif traits.expanded_masks and not torch.compiler.is_exporting():
        # taken as it is; given (B, M), models ask whether everything is visible, and wait for the GPU. Exported graphs
        # have (B, M), whose pattern ONNX Runtime's fusions know
        mask = expanded(visible)
    arguments = {"inputs_embeds": content, "attention_mask": mask}
    if positions is not None and traits.first_position is not None:
        arguments["position_ids"] = positions + traits.first_position
    return model(**arguments).last_hidden_state


def expanded(visible: Tensor) -> Tensor:
    """(B, 1, 1, N) bool from (B, N)."""
    return visible[:, None, None, :] > 0


def probed(config: PretrainedConfig) -> EncoderTraits:
    """The traits of the encoders that a configuration makes.

    Tried on a shallow one with large random weights: in trained or narrow ones a difference can be too small to see.

    ConfigError: it takes no embeddings, reads in one direction only, or lets padding change its states.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            model = _with_large_weights(config)
        except NotImplementedError as error:
            raise ConfigError(f"the encoder '{config.model_type}' cannot be cut to a few layers: {error}") from None
        return _Probe(model).traits()


def _with_large_weights(config: PretrainedConfig) -> PreTrainedModel:
    config = deepcopy(config)
    kinds = list(getattr(config, "layer_types", None) or [""])
    config.num_hidden_layers = min(config.num_hidden_layers, max(2, *(kinds.index(kind) + 1 for kind in kinds)))
    if kinds != [""]:
        config.layer_types = kinds[: config.num_hidden_layers]
    model = build_encoder(config).eval()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                fan_in = 1 if isinstance(module, nn.Embedding) else parameter[0].numel()
                nn.init.normal_(parameter, std=fan_in**-0.5)
    return model


class _Probe:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.name = model, model.config.model_type
        self.traits_so_far = EncoderTraits(first_position=None, expanded_masks=False, gathering="packed")
        parameters = _parameters(model.forward)
        if missing := {"inputs_embeds", "attention_mask"} - parameters:
            names = " and ".join(sorted(missing))
            raise ConfigError(f"the encoder '{self.name}' takes no {names}, so no word can be removed")
        self.takes_positions = "position_ids" in parameters
        self.length = min(_LENGTH, getattr(model.config, "max_position_embeddings", None) or _LENGTH) - 4
        table = model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise ConfigError(f"the encoder '{self.name}' has no plain table of word embeddings; fix: another encoder")
        self.content = table(torch.randint(0, table.num_embeddings, (2, self.length)))
        self.visible = torch.ones(2, self.length, dtype=torch.int64)
        self.visible[1, self.length * 2 // 3 :] = 0
        try:
            self.states = self._states()
        except Exception as error:  # whatever an encoder says that wants more than embeddings
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"the encoder '{self.name}' does not run on embeddings alone: {reason}") from None

    def _with(self, **traits: Any) -> EncoderTraits:
        return self.traits_so_far.model_copy(update=traits)

    def _states(self, content: Tensor | None = None, positions: Tensor | None = None, **traits: Any) -> Tensor:
        content = self.content if content is None else content
        return last_states(self.model, self._with(**traits), content, self.visible, positions)

    def _same(self, states: Tensor, seen: Tensor) -> bool:
        """Whether states are those of the plain run wherever ``seen`` (B, N) bool says."""
        largest = self.states[seen].abs().max()
        return bool((states - self.states)[seen].abs().max() <= _TOLERANCE * largest)

    def traits(self) -> EncoderTraits:
        real = self.visible > 0
        if not self._same(self._states(torch.where(real.unsqueeze(-1), self.content, self.content.roll(1, 1))), real):
            raise ConfigError(f"the encoder '{self.name}' lets padding change its states; fix: another encoder")
        start = torch.zeros_like(real)
        start[:, 0] = True
        if self._same(self._states(torch.where(start.unsqueeze(-1), self.content, self.content.roll(1, 1))), start):
            raise ConfigError(
                f"the encoder '{self.name}' reads in one direction only, so its start token does not see the words; "
                "fix: a bidirectional encoder (BERT, RoBERTa, ModernBERT, ...)"
            )
        order = torch.arange(self.length).expand(2, -1)
        for first in range(4) if self.takes_positions else ():
            if self._same(self._states(positions=order, first_position=first), real):
                self.traits_so_far = self._with(first_position=first)
                break
        with suppress(Exception):  # an encoder that knows no such mask says so in its own way
            self.traits_so_far = self._with(expanded_masks=self._same(self._states(expanded_masks=True), real))
        return self._with(gathering=self._gathering(real))

    def _gathering(self, real: Tensor) -> str:
        keep = (torch.rand(real.shape) < 0.25) & real
        keep[:, 0] = True
        masked = last_states(self.model, self.traits_so_far, self.content, keep.to(torch.int64))[:, 0]
        positions, kept = kept_positions(keep, self.length // 2)
        content = self.content.gather(1, positions.unsqueeze(-1).expand(-1, -1, self.content.shape[2]))
        local = "sliding_attention" in (getattr(self.model.config, "layer_types", None) or ())
        for gathering in ("exact", "windowed") if local else ("exact",):
            traits = self._with(gathering=gathering)
            found = last_states(self.model, traits, content, kept.to(torch.int64), positions)[:, 0]
            if (found - masked).abs().max() <= _TOLERANCE * masked.abs().max():
                return gathering
        return "packed"


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)
