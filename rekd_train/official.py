"""The authors' checkpoints -> ours.

Their code saves two pickled state dictionaries, a generator (our selector) and an encoder (our
predictor), both over the same ``transformers`` backbone, whose config.json holds what weights do not
tell: heads, LayerNorm epsilon, activation. Import is strict: every key is used, known as not read by
their forward pass, or named in the error.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rekd_train.checkpoint import save
from rekd_train.config import BackboneConfig, ImageConfig
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.files import sha256
from rekd_train.models.base import Predictor, Selector
from rekd_train.models.families import build_backbone
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.official_weights import StateReader, bert_weights, vit_weights
from rekd_train.policy import PAPER_POLICY
from rekd_train.preprocess import TOKENIZER_FILE, TextPreprocessor, TextSettings
from rekd_train.preprocess_image import ImagePreprocessor, ImageSettings
from rekd_train.preprocess_token_ids import TokenIdPreprocessor, TokenIdSettings
from rekd_train.preprocessors import Preprocessor

OfficialFamily = Literal["bert", "vit"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_HEAD_DROPOUT = {"bert": 0.5, "vit": 0.1}
"""What the authors' runs used; matters only if the import is trained further."""
_CIFAR_SIDE = 32


def import_official(
    family: OfficialFamily,
    selector: str | Path,
    predictor: str | Path,
    backbone: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    labels: Sequence[str] | None = None,
    max_length: int = 256,
    image_side: int = _CIFAR_SIDE,
) -> Path:
    """Write a checkpoint that answers as the authors' pair does without its noise.

    The decision rule is the paper's (argmax, every position, no limit) and the operator 'zero'.

    Args:
        family: 'bert' or 'vit'.
        selector: their generator's file ("g_...").
        predictor: their encoder's file ("f_...").
        backbone: directory of the pretrained model both started from; its config.json is read.
        output: the checkpoint's directory.
        tokenizer: tokenizer.json or vocab.txt (BERT); None: the backbone directory's. With neither the
            checkpoint takes token ids, not texts.
        labels: class names in the order of the logits; None: "0", "1", ...
        max_length: tokens a text is cut to (BERT), at most the backbone's positions.
        image_side: height and width of the images as they come (ViT); CIFAR's 32 unless said otherwise.

    Returns:
        ``output``.

    Raises:
        CheckpointError: a file is missing, damaged, unsafe, or does not fit; the message names every key.
        ConfigError: labels, tokenizer or sizes that do not fit the weights.
    """
    if family not in _SETTINGS:
        raise ConfigError(f"unknown family '{family}'; the authors' checkpoints are of: {', '.join(_SETTINGS)}")
    config = _read_config(Path(backbone), family)
    try:
        settings = _SETTINGS[family](config, image_side)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        path = Path(backbone) / "config.json"
        raise CheckpointError(f"{path} does not fit the family '{family}': {reason}") from None
    states = {
        role: StateReader(Path(path), _read_state(Path(path)), family, role)
        for role, path in (("selector", selector), ("predictor", predictor))
    }
    preprocessor = (
        ImagePreprocessor(ImageSettings.of(settings))
        if family == "vit"
        else _text_preprocessor(Path(backbone), tokenizer, min(max_length, settings.positions), config)
    )
    rationalizer = _pair(family, settings, preprocessor, states, labels)
    origins = [
        f"{role} {Path(path).name} (SHA-256 {sha256(Path(path))}), made with the authors' code"
        for role, path in (("selector", selector), ("predictor", predictor))
    ]
    unread = {role: state.unread for role, state in states.items()}
    return save(
        rationalizer,
        output,
        training={"name": Path(output).name, "stage": "imported", "origins": origins, "unread_keys": unread},
    )


def _pair(
    family: OfficialFamily,
    settings: BackboneConfig,
    preprocessor: Preprocessor,
    states: dict[str, StateReader],
    labels: Sequence[str] | None,
) -> Rationalizer:
    selector_head, predictor_head = {"bert": ("feature_proj", "fc"), "vit": (None, "classifier")}[family]
    head_width = states["selector"].rows(f"{selector_head}.weight") if selector_head else 0
    classes = states["predictor"].rows(f"{predictor_head}.weight")
    selector_settings = settings.model_copy(update={"head_width": head_width})
    predictor_settings = settings.model_copy(update={"final_norm": family != "vit"})
    selector = Selector(build_backbone(selector_settings, preprocessor.special_ids))
    predictor = Predictor(build_backbone(predictor_settings, preprocessor.special_ids), classes, operator="zero")
    weights = bert_weights if family == "bert" else vit_weights
    selector_state = weights(states["selector"], selector.backbone)
    predictor_state = weights(states["predictor"], predictor.backbone)
    if family == "bert":
        selector_state |= states["selector"].linear("feature_proj", selector.head[0], "head.0")
    selector_state |= states["selector"].linear("fc", selector.head[-1], f"head.{len(selector.head) - 1}")
    predictor_state |= states["predictor"].linear(predictor_head, predictor.head[-1], "head.1")
    for state in states.values():
        state.finish()
    names = [str(index) for index in range(classes)] if labels is None else [str(label) for label in labels]
    if len(names) != classes or len(set(names)) != classes:
        raise ConfigError(f"labels {names} do not fit: the predictor has {classes} classes, each needs its own name")
    _load(selector, selector_state)
    _load(predictor, predictor_state)
    return Rationalizer(selector, predictor, PAPER_POLICY, preprocessor, names).eval()


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)


def _bert_settings(config: dict[str, Any], image_side: int) -> BackboneConfig:
    return BackboneConfig(
        **_transformer_sizes(config, "bert"),
        positions=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
        dropout=config.get("hidden_dropout_prob", 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
    )


def _vit_settings(config: dict[str, Any], image_side: int) -> BackboneConfig:
    side = config["image_size"]
    native = min(image_side, side)
    channels = config.get("num_channels", 3)
    return BackboneConfig(
        **_transformer_sizes(config, "vit"),
        dropout=config.get("hidden_dropout_prob", 0.0),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.0),
        image=ImageConfig(
            height=native,
            width=native,
            channels=channels,
            upscale_to=None if native == side else side,
            patch=config["patch_size"],
            mean=_IMAGENET_MEAN if channels == 3 else (0.5,),
            std=_IMAGENET_STD if channels == 3 else (0.5,),
        ),
    )


def _transformer_sizes(config: dict[str, Any], family: OfficialFamily) -> dict[str, Any]:
    return {
        "family": family,
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "feedforward": config["intermediate_size"],
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        "head_dropout": _HEAD_DROPOUT[family],
    }


_SETTINGS = {"bert": _bert_settings, "vit": _vit_settings}


def _text_preprocessor(
    backbone: Path, tokenizer: str | Path | None, max_length: int, config: dict[str, Any]
) -> Preprocessor:
    if tokenizer is not None:
        path = Path(tokenizer)
        candidates = [path / TOKENIZER_FILE, path / "vocab.txt"] if path.is_dir() else [path]
    else:
        candidates = [backbone / TOKENIZER_FILE, backbone / "vocab.txt"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is not None:
        return TextPreprocessor(_tokenizer_json(found), TextSettings(max_length))
    if tokenizer is not None:
        raise ConfigError(f"no tokenizer at {tokenizer}; give tokenizer.json, vocab.txt or a directory with either")
    return TokenIdPreprocessor(TokenIdSettings(max_length, pad=config.get("pad_token_id") or 0))


def _tokenizer_json(path: Path) -> str:
    """Content of a tokenizer.json, made from vocab.txt as BERT's own tokenizer would be."""
    try:
        if path.suffix == ".json":
            return path.read_text(encoding="utf-8")
        from tokenizers import BertWordPieceTokenizer

        beside = path.with_name("tokenizer_config.json")
        options = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        return BertWordPieceTokenizer(str(path), lowercase=options.get("do_lower_case", True)).to_str()
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from None


def _read_config(backbone: Path, family: OfficialFamily) -> dict[str, Any]:
    path = backbone / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give the directory of the pretrained model, as downloaded") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    expected = {
        "model_type": family, "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; the family '{family}' has {value!r}")
    return config


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickle protocols before it refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is not a plain state dictionary, or holds objects that could run code; refused ({reason})"
        ) from None
    except Exception as error:  # bytes that are no pickle end in errors of many kinds
        raise CheckpointError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}; is it cut off?") from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dictionary (names and tensors only)")
    return dict(state)
