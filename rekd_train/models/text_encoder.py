"""Any text encoder of ``transformers`` that takes ``inputs_embeds``, as the backbone of a selector or predictor."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from rekd_train.config.run import BackboneConfig, EncoderTraits
from rekd_train.errors import ConfigError
from rekd_train.models.base import Inputs, TextBackbone, with_cls
from rekd_train.models.bert import first_state
from rekd_train.models.gates import kept_positions

DROPOUTS = {
    "dropout": ("hidden_dropout_prob", "hidden_dropout", "dropout", "embedding_dropout", "mlp_dropout"),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout"),
}
"""What the libraries' configurations call them."""
_NOT_STORED = {"transformers_version", "_name_or_path", "dtype", "architectures", "id2label", "label2id"}
_PROBE_LENGTH = 320
"""Tokens of the probe: longer than any local attention or bucket of distances in use reaches to one side."""
_TOLERANCE = 2e-4
"""Largest difference between masked and gathered states, relative to their size, that rounding explains."""


class TextEncoder(TextBackbone):
    """Words through an encoder of ``transformers``, built from the library's own configuration.

    Inputs: ``input_ids`` and ``attention_mask``, int64 (B, N), right-padded, the start token at position 0. Kept tokens
    keep their original positions. With the operator 'compact' the predictor sees the start token and the kept tokens
    and nothing else, not even the end token, whose position would tell the length. Where an encoder counts distance by
    slot instead of by position, its compact input is defined as the packed sequence (``traits.gathering``).

    Args:
        settings: ``architecture``, the library's configuration; empty: a BERT of the sizes given. ``traits`` that are
            not recorded yet are probed on the built model.
        special_ids: token ids that are never selectable; 'pad' is used.

    Raises:
        ConfigError: an encoder that this cannot run; the message says why.
    """

    def __init__(self, settings: BackboneConfig, special_ids: dict[str, int]) -> None:
        super().__init__()
        self.special_ids = dict(special_ids)
        self.model = _build(_library_config(settings, special_ids))
        if settings.traits is None:
            settings = settings.model_copy(update={"traits": probed(self.model)})
        self.settings = settings
        self.traits = settings.traits

    @property
    def table(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def states(self, inputs: Inputs) -> Tensor:
        return self._encode(self.words(inputs["input_ids"]), inputs["attention_mask"])

    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        words = self.words(inputs["input_ids"])
        keep = keep if keep.dtype == words.dtype else keep.to(words.dtype)  # a product with float32 would be float32
        return self._pooled(words * keep.unsqueeze(-1), inputs["attention_mask"])

    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        if self.traits.gathering == "packed":
            return self.gathered(inputs, *kept_positions(keep, keep.shape[1] - 1))
        visible = torch.cat([torch.ones_like(keep[:, :1]), keep[:, 1:]], dim=1)
        return self._pooled(self.words(inputs["input_ids"]), visible.to(torch.int64))

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        indices = with_cls(positions)
        kept = kept & (positions > 0)  # a rule that may choose the start token must not show it twice
        visible = torch.cat([torch.ones_like(positions[:, :1]), kept.to(torch.int64)], dim=1)
        return self._pooled(self.words(inputs["input_ids"].gather(1, indices)), visible, indices)

    def _pooled(self, content: Tensor, visible: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, H): what a predictor reads, the state of the start token or the mean of the visible ones."""
        if self.settings.pooling == "mean":
            weights = visible.to(content.dtype).unsqueeze(-1)
            return (self._encode(content, visible, positions) * weights).sum(1) / weights.sum(1)
        if self.model.config.model_type == "bert" and not torch.compiler.is_exporting():
            return first_state(self.model, content, _expanded(visible), positions)
        return self._encode(content, visible, positions)[:, 0]

    def _encode(self, content: Tensor, visible: Tensor, positions: Tensor | None = None) -> Tensor:
        # whole models are exported with (B, N), whose pattern ONNX Runtime's fusions know; elsewhere a mask that is
        # taken as it is saves the question whether everything is visible, which waits for the GPU
        expanded = self.traits.expanded_masks and not torch.compiler.is_exporting()
        mask: Any = _expanded(visible) if expanded else visible
        if positions is not None and self.traits.gathering == "windowed":
            mask = self._windows(_expanded(visible), positions)
        return _states(self.model, self.traits, content, mask, positions)

    def _windows(self, visible: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Masks (B, 1, M, M) by the kind of layer: local layers see what was near in the whole text."""
        near = (positions[:, :, None] - positions[:, None, :]).abs() <= self.model.config.sliding_window
        whole = visible.expand(-1, -1, positions.shape[1], -1)
        return {"full_attention": whole, "sliding_attention": whole & near.unsqueeze(1)}


def _expanded(visible: Tensor) -> Tensor:
    """(B, 1, 1, N) bool from (B, N)."""
    return visible[:, None, None, :] > 0


def _states(
    model: PreTrainedModel, traits: EncoderTraits, content: Tensor, mask: Any, positions: Tensor | None
) -> Tensor:
    arguments = {"inputs_embeds": content, "attention_mask": mask}
    if positions is not None and traits.first_position is not None:
        arguments["position_ids"] = positions + traits.first_position
    return model(**arguments).last_hidden_state


def stored(config: PretrainedConfig) -> dict[str, Any]:
    """A library's configuration as a checkpoint stores it: what it computes, not where it comes from."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in _NOT_STORED}


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


def _build(config: PretrainedConfig) -> PreTrainedModel:
    """The encoder without a pooler where it can be left out."""
    kind = type(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model_class = AutoModel._model_mapping[kind]  # noqa: SLF001  from_config does not say which class it takes
            options = {"add_pooling_layer": False} if "add_pooling_layer" in _parameters(model_class.__init__) else {}
            return AutoModel.from_config(config, **options)
    except KeyError:
        raise ConfigError(f"transformers has no encoder of the type '{config.model_type}'") from None
    except (ValueError, AssertionError, RuntimeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the encoder of the type '{config.model_type}' cannot be built: {reason}") from None


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@torch.no_grad()
def probed(model: PreTrainedModel) -> EncoderTraits:
    """How an encoder counts positions and masks, found out on random inputs.

    Raises:
        ConfigError: it takes no embeddings, reads in one direction only, or lets padding change its states.
    """
    name = model.config.model_type
    parameters = _parameters(model.forward)
    if missing := {"inputs_embeds", "attention_mask"} - parameters:
        raise ConfigError(f"the encoder '{name}' does not take {', '.join(sorted(missing))}, so no word can be removed")
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _probed(model.eval(), name, "position_ids" in parameters)
    finally:
        model.train(training)


def _probed(model: PreTrainedModel, name: str, takes_positions: bool) -> EncoderTraits:
    table = model.get_input_embeddings()
    length = min(_PROBE_LENGTH, getattr(model.config, "max_position_embeddings", _PROBE_LENGTH) - 4)
    content = table(torch.randint(0, table.num_embeddings, (2, length)))
    visible = torch.ones(2, length, dtype=torch.int64)
    visible[1, length * 2 // 3 :] = 0
    plain = EncoderTraits(first_position=None, expanded_masks=False, gathering="packed")
    try:
        states = _states(model, plain, content, visible, None)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise ConfigError(f"the encoder '{name}' does not run on embeddings alone: {str(error).strip()[:200]}") from None

    def same(others: Tensor, mask: Tensor = visible) -> bool:
        size = states[mask > 0].abs().max().clamp(min=1e-6)
        return bool((others - states)[mask > 0].abs().max() <= _TOLERANCE * size)

    changed = torch.where(visible.unsqueeze(-1) > 0, content, content.roll(1, 1))
    if not same(_states(model, plain, changed, visible, None)):
        raise ConfigError(f"the encoder '{name}' lets padding change its states; fix: another encoder")
    ahead = torch.cat([content[:, :1], content[:, 1:].roll(1, 1)], dim=1)
    if same(_states(model, plain, ahead, visible, None), torch.eye(1, length, dtype=torch.int64).expand(2, -1)):
        raise ConfigError(
            f"the encoder '{name}' reads in one direction only: its first state does not see the words behind; "
            "fix: a bidirectional encoder (BERT, RoBERTa, ModernBERT, ...)"
        )
    order = torch.arange(length).expand(2, -1)
    first = None
    for start in range(4) if takes_positions else ():
        if same(_states(model, plain.model_copy(update={"first_position": start}), content, visible, order)):
            first = start
            break
    expanded = False
    try:
        expanded = same(_states(model, plain, content, _expanded(visible), None))
    except Exception:  # whatever an encoder says about a mask that it does not know
        expanded = False
    traits = EncoderTraits(first_position=first, expanded_masks=expanded, gathering="packed")
    keep = (torch.rand(2, length) < 0.25) & (visible > 0)
    keep[:, 0] = True
    masked = _states(model, traits, content, keep.to(torch.int64), None)
    scale = masked[:, 0].abs().max()
    indices, kept = kept_positions(keep, length)
    gathered = content.gather(1, indices.unsqueeze(-1).expand(-1, -1, content.shape[2]))
    for gathering in ("exact", "windowed"):
        candidate = traits.model_copy(update={"gathering": gathering})
        mask: Any = kept.to(torch.int64)
        if gathering == "windowed":
            if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
                break
            near = (indices[:, :, None] - indices[:, None, :]).abs() <= model.config.sliding_window
            whole = _expanded(mask).expand(-1, -1, length, -1)
            mask = {"full_attention": whole, "sliding_attention": whole & near.unsqueeze(1)}
        found = _states(model, candidate, gathered, mask, indices)
        if (found[:, 0] - masked[:, 0]).abs().max() <= _TOLERANCE * scale:
            return candidate
    return traits


def quiet() -> None:
    """transformers says nothing about weights that are left out on purpose."""
    logging.set_verbosity_error()
