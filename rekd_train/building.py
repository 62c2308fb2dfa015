"""From a configuration to a fresh pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rekd_train.config import BackboneConfig, RunConfig
from rekd_train.models.base import Backbone, Predictor, Selector
from rekd_train.models.families import build_backbone
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.policy import SelectionPolicy
from rekd_train.preprocess import TextPreprocessor, TextSettings
from rekd_train.pretrained import minilm_tokenizer_json, minilm_word_embeddings


def text_preprocessor(config: RunConfig) -> TextPreprocessor:
    """MiniLM's tokenizer (BERT uncased) with the run's length limits."""
    return TextPreprocessor(minilm_tokenizer_json(), TextSettings(config.data.max_length, config.data.lengths))


def fresh_pair(config: RunConfig, preprocessor: TextPreprocessor, labels: Sequence[str]) -> Rationalizer:
    """A pair with random weights, and pretrained word embeddings where the configuration asks for them."""
    torch.manual_seed(config.seed)
    selector = Selector(_backbone(config.selector, preprocessor))
    predictor = Predictor(_backbone(config.predictor, preprocessor), len(labels))
    policy = SelectionPolicy(bias=0.0, budget=config.selection.budget, minimum=config.selection.minimum)
    return Rationalizer(selector, predictor, policy, preprocessor, labels)


def _backbone(settings: BackboneConfig, preprocessor: TextPreprocessor) -> Backbone:
    backbone = build_backbone(settings, preprocessor.special_ids)
    if settings.word_embeddings == "minilm":
        backbone.load_word_embeddings(minilm_word_embeddings(settings.width))
    return backbone
