"""The registry of families, and a fresh pair of networks with its preprocessing from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rekd_train.config.run import BackboneConfig, RunConfig
from rekd_train.errors import ConfigError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor, same_tokens
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models.base import Backbone, Predictor, Selector, TextBackbone
from rekd_train.models.bert import BertBackbone
from rekd_train.models.bilstm import BilstmBackbone
from rekd_train.models.pretrained import (
    MINILM_ORIGIN,
    load_weights,
    minilm_tokenizer_json,
    minilm_word_embeddings,
    open_source,
    sized,
    source_path,
)
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.models.weight_files import tokenizer_json


@dataclass(frozen=True)
class Family:
    """One family of backbones."""

    backbone: Callable[[BackboneConfig, dict[str, int]], Backbone]
    """Builds a backbone from its settings and the special token ids."""
    modality: str
    """'text' or 'image': which preprocessing its inputs come from."""


def _vit(settings: BackboneConfig, special_ids: dict[str, int]) -> Backbone:
    from rekd_train.models.vit import VitBackbone  # timm takes seconds to import, text models do not need it

    return VitBackbone(settings, special_ids)


FAMILIES: dict[str, Family] = {
    "bert": Family(backbone=BertBackbone, modality="text"),
    "bilstm": Family(backbone=BilstmBackbone, modality="text"),
    "vit": Family(backbone=_vit, modality="image"),
}


def build_backbone(settings: BackboneConfig, special_ids: dict[str, int]) -> Backbone:
    """A randomly initialised backbone.

    Raises:
        ConfigError: the family is not registered.
    """
    if settings.family not in FAMILIES:
        raise ConfigError(f"unknown family '{settings.family}'; families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[settings.family].backbone(settings, special_ids)


def preprocessor_for(config: RunConfig) -> Preprocessor:
    """How this run's texts or images become tensors.

    Texts: by the tokenizer of the pretrained weights, else MiniLM's (BERT uncased), with the run's length limits.

    Raises:
        ConfigError: selector and predictor start from models with different tokenizers.
    """
    if config.data.modality == "image":
        return ImagePreprocessor(ImageSettings.of(config.predictor))
    sources = [(getattr(config, role).pretrained, role) for role in ("predictor", "selector")]
    found = [tokenizer_json(source_path(weights, role)) for weights, role in sources if weights]
    contents = [content for content in found if content is not None] or [minilm_tokenizer_json()]
    settings = TextSettings(config.data.max_length, config.data.lengths)
    preprocessors = [TextPreprocessor(content, settings) for content in contents]
    if not same_tokens(preprocessors[0], preprocessors[-1]):
        raise ConfigError(
            "selector.pretrained and predictor.pretrained come with different tokenizers, but both read the same "
            "tokens; fix: weights of one vocabulary"
        )
    return preprocessors[0]


def fresh_pair(config: RunConfig, preprocessor: Preprocessor, labels: Sequence[str]) -> Rationalizer:
    """An untrained pair: random weights, or the pretrained ones that the configuration names.

    Raises:
        CheckpointError: pretrained weights are missing, damaged or do not fit.
        ConfigError: sizes that contradict the pretrained weights.
    """
    for role in ("selector", "predictor"):
        _check_modality(getattr(config, role), config, role)
    torch.manual_seed(config.seed)
    selector = Selector(_backbone(config.selector, preprocessor, "selector"))
    predictor = Predictor(_backbone(config.predictor, preprocessor, "predictor"), len(labels))
    policy = SelectionPolicy(bias=0.0, budget=config.selection.budget, minimum=config.selection.minimum)
    return Rationalizer(selector, predictor, policy, preprocessor, labels)


def weight_origins(config: RunConfig) -> list[str]:
    """Where pretrained parts come from and under which terms, for the model card."""
    origins = []
    for role in ("selector", "predictor"):
        settings = getattr(config, role)
        if settings.pretrained not in ("", "minilm"):  # they bring their own word embeddings
            origins.append(f"pretrained weights {settings.pretrained}, under their own licence")
        elif settings.pretrained or settings.word_embeddings == "minilm":
            origins.append(MINILM_ORIGIN)
    return list(dict.fromkeys(origins))


def _check_modality(settings: BackboneConfig, config: RunConfig, role: str) -> None:
    modality = config.data.modality
    fitting = sorted(name for name, family in FAMILIES.items() if family.modality == modality)
    if settings.family in FAMILIES and settings.family not in fitting:
        raise ConfigError(
            f"data '{config.data.name}' are {modality}s, which the {role}'s family '{settings.family}' cannot read; "
            f"fix: --set {role}.family={' or '.join(fitting)}"
        )


def _backbone(settings: BackboneConfig, preprocessor: Preprocessor, role: str) -> Backbone:
    if settings.pretrained:
        source = open_source(settings.pretrained, settings.family, role)
        backbone = build_backbone(sized(settings, source, role), preprocessor.special_ids)
        load_weights(backbone, source, role)
        return backbone
    backbone = build_backbone(settings, preprocessor.special_ids)
    if settings.word_embeddings == "minilm":
        if not isinstance(backbone, TextBackbone):
            raise ConfigError(f"{role}.word_embeddings: the family '{settings.family}' has no word embeddings")
        backbone.load_word_embeddings(minilm_word_embeddings(settings.width))
    return backbone
