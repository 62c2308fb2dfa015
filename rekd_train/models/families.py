"""The registry of families, and a fresh pair of networks with its preprocessing from a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rekd_train.config.run import BackboneConfig, RunConfig
from rekd_train.config.sections import own_class
from rekd_train.errors import CheckpointError, CodeError, ConfigError, RekdError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor, same_tokens
from rekd_train.inputs.text import TOKENIZER_FILE, TextPreprocessor, TextSettings
from rekd_train.models import pretrained
from rekd_train.models.base import Backbone, Predictor, Selector, TextBackbone
from rekd_train.models.bilstm import BilstmBackbone
from rekd_train.models.ngrams import NgramBackbone
from rekd_train.models.pretrained import load_weights, open_source, sized, source_path
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.models.text_encoder import TextEncoder


@dataclass(frozen=True)
class Family:
    """One family of backbones."""

    backbone: Callable[[BackboneConfig, dict[str, int]], Backbone]  # from its settings and the special token ids
    modality: str  # 'text' or 'image': which preprocessing its inputs come from


def _timm(settings: BackboneConfig, special_ids: dict[str, int]) -> Backbone:
    from rekd_train.models.image_encoder import ImageEncoder  # timm takes seconds to import; text models do not need it

    return ImageEncoder(settings, special_ids)


FAMILIES: dict[str, Family] = {
    "transformers": Family(backbone=TextEncoder, modality="text"),
    "bilstm": Family(backbone=BilstmBackbone, modality="text"),
    "ngrams": Family(backbone=NgramBackbone, modality="text"),
    "timm": Family(backbone=_timm, modality="image"),
}


def build_backbone(settings: BackboneConfig, special_ids: dict[str, int]) -> Backbone:
    """A randomly initialised backbone.

    ConfigError: the family is not registered; CodeError: one of the user's own is not trusted, not there, or none.
    """
    return family_of(settings.family).backbone(settings, special_ids)


def family_of(name: str) -> Family:
    """A registered family, or the user's own, ``package.module:Class``; raises as ``build_backbone``."""
    if ":" not in name and name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"unknown family '{name}'; families: {known}, or your own, package.module:Class")
    return _own_family(name) if ":" in name else FAMILIES[name]


def _own_family(name: str) -> Family:
    backbone = own_class(name)
    if not isinstance(backbone, type) or not issubclass(backbone, Backbone):
        raise CodeError(f"{name} is no subclass of rekd_train.models.base.Backbone or TextBackbone; fix: make it one")
    if missing := ", ".join(sorted(backbone.__abstractmethods__)):
        raise CodeError(f"{name} does not define {missing}; fix: see docs/adding_a_family.md")
    if getattr(backbone, "modality", None) not in ("text", "image"):
        raise CodeError(f'{name} does not say what it reads; fix: modality = "text", or "image", in the class')

    def build(settings: BackboneConfig, special_ids: dict[str, int]) -> Backbone:
        try:
            built = backbone(settings, special_ids)
            if not isinstance(built.settings, BackboneConfig):
                raise TypeError("its settings are no BackboneConfig")
        except RekdError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CodeError(f"{name} cannot be built ({reason}); --debug shows where") from error
        return built

    return Family(backbone=build, modality=backbone.modality)


def preprocessor_for(config: RunConfig) -> Preprocessor:
    """How this run's texts or images become tensors.

    Texts: by the tokenizer of the pretrained weights, else MiniLM's (BERT uncased), with the run's length limits.

    ConfigError: selector and predictor start from models with different tokenizers.
    """
    if config.data.modality == "image":
        settings = config.predictor
        if settings.pretrained:
            settings = sized(settings, open_source(settings.pretrained, settings.family, "predictor"), "predictor")
        return ImagePreprocessor(ImageSettings.of(settings))
    sources = [(getattr(config, role).pretrained, role) for role in ("predictor", "selector")]
    paths = [source_path(weights, role) for weights, role in sources if weights]
    contents = [content for content in map(tokenizer_json, paths) if content is not None]
    if not contents and (folders := [path for path in paths if path.is_dir()]):
        raise ConfigError(f"{folders[0]} holds no tokenizer; fix: save the one that the weights were trained with "
                          "there, AutoTokenizer.from_pretrained(...).save_pretrained(DIR)")
    contents = contents or [tokenizer_json(pretrained.minilm_directory())]
    settings = TextSettings(config.data.max_length, config.data.lengths)
    preprocessors = [TextPreprocessor(content, settings) for content in contents]
    if not same_tokens(preprocessors[0], preprocessors[-1]):
        raise ConfigError("selector.pretrained and predictor.pretrained come with different tokenizers, but both read "
                          "the same tokens; fix: two networks of one vocabulary")
    return preprocessors[0]


def fresh_pair(config: RunConfig, preprocessor: Preprocessor, labels: Sequence[str]) -> Rationalizer:
    """An untrained pair: random weights, or the pretrained ones that the configuration names.

    CheckpointError: pretrained weights are missing, damaged or do not fit; ConfigError: sizes that contradict them.
    """
    modality = config.data.modality
    for role in ("selector", "predictor"):
        family = getattr(config, role).family
        if family_of(family).modality != modality:
            fitting = sorted(name for name, known in FAMILIES.items() if known.modality == modality)
            raise ConfigError(f"data '{config.data.name}' are {modality}s, which the {role}'s family '{family}' cannot "
                              f"read; fix: --set {role}.family={' or '.join(fitting)}")
    torch.manual_seed(config.seed)
    selector = Selector(_backbone(config.selector, preprocessor, "selector"))
    predictor = Predictor(_backbone(config.predictor, preprocessor, "predictor"), len(labels))
    if "compact" not in predictor.backbone.operators:
        gathers = config.stages.operator == "gather" and config.stages.rationale_epochs > 0
        fixes = {"stages.operator=zero": gathers, "stages.compact_epochs=0": config.stages.compact_epochs}
        if fix := " ".join(f"--set {setting}" for setting, needed in fixes.items() if needed):
            raise ConfigError(f"the predictor's features are no tokens, so kept patches cannot be gathered; fix: {fix}")
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
            origins.append(pretrained.MINILM_ORIGIN)
    return list(dict.fromkeys(origins))


def _backbone(settings: BackboneConfig, preprocessor: Preprocessor, role: str) -> Backbone:
    if settings.pretrained:
        source = open_source(settings.pretrained, settings.family, role)
        backbone = build_backbone(sized(settings, source, role), preprocessor.special_ids)
        load_weights(backbone, source)
        return backbone
    backbone = build_backbone(settings, preprocessor.special_ids)
    if settings.word_embeddings == "minilm":
        if not isinstance(backbone, TextBackbone):
            raise ConfigError(f"{role}.word_embeddings: the family '{settings.family}' has no word embeddings")
        backbone.load_word_embeddings(pretrained.minilm_word_embeddings(backbone.table.embedding_dim))
    return backbone


def tokenizer_json(path: Path) -> str | None:
    """Content of the fast tokenizer of a directory, or of a file tokenizer.json or vocab.txt (BERT's).

    None if there is none; CheckpointError: damaged, or a tokenizer that has no fast form.
    """
    whole = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        if whole.is_file() and whole.suffix == ".json":
            return whole.read_text(encoding="utf-8")
        config = path / "config.json"  # it may not tell the library what it is, as those of the small BERTs do not
        if path.is_dir() and not (config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8"))):
            whole = path / "vocab.txt"
        if whole.is_file():
            from tokenizers import BertWordPieceTokenizer

            beside = whole.with_name("tokenizer_config.json")
            options = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
            return BertWordPieceTokenizer(str(whole), lowercase=options.get("do_lower_case", True)).to_str()
        if any(any(path.glob(name)) for name in ("tokenizer_config.json", "vocab.*", "*.model")):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True)
            if not tokenizer.is_fast:
                raise ValueError(f"{type(tokenizer).__name__} has no fast form and cannot be used")
            return tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the libraries raise bare Exception
        raise CheckpointError(f"{path} cannot be read as a fast tokenizer: {pretrained.reason_of(error)}; fix: save it "
                              "once with AutoTokenizer(..., use_fast=True).save_pretrained(DIR), which writes "
                              "tokenizer.json, where it has a fast form") from None
    return None
