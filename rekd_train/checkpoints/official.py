"""The authors' checkpoints -> ours.

Their code saves two pickled state dictionaries, a generator (our selector) and an encoder (our predictor), both over
the same ``transformers`` backbone, whose config.json holds what weights do not tell: heads, LayerNorm epsilon,
activation. Import is strict: every key is used, known as not read by their forward pass, or named in the error.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rekd_train.checkpoints import in_one_line
from rekd_train.checkpoints.checkpoint import check_output, save
from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.files import sha256
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import PAPER_POLICY
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models.base import Backbone, Predictor, Selector
from rekd_train.models.families import build_backbone, tokenizer_json
from rekd_train.models.rationalizer import Rationalizer

OfficialFamily = Literal["bert", "vit"]

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # red, green and blue of its images, in 0..1
_UNREAD = re.compile(r"^(bert\.bert|vit\.vit)\.(pooler\.|embeddings\.(position_ids|token_type_ids)$)")


def import_official(family: OfficialFamily, selector: str | Path, predictor: str | Path, backbone: str | Path,
                    output: str | Path, *, tokenizer: str | Path | None = None, labels: Sequence[str] | None = None,
                    max_length: int = 256, image_side: int = 32, overwrite: bool = False) -> Path:
    """Write a checkpoint that answers as the authors' pair does without its noise; returns its directory.

    The decision rule is the paper's (argmax, every position, no limit) and the operator 'zero'.

    Args:
        selector, predictor: the files of their generator ("g_...") and of their encoder ("f_...").
        backbone: directory of the pretrained model both started from; its config.json is read.
        tokenizer: tokenizer.json or vocab.txt (BERT); None: the backbone directory's.
        labels: class names in the order of the logits; None: "0", "1", ...
        max_length: tokens a text is cut to (BERT), at most the backbone's positions.
        image_side: height and width of the images as they come (ViT); CIFAR's 32 unless said otherwise.

    CheckpointError: a file is missing, damaged, unsafe, or does not fit; the message names every key; ConfigError:
    labels, tokenizer or sizes that do not fit the weights.
    """
    check_output(output, overwrite)
    if family not in get_args(OfficialFamily):
        families = ", ".join(get_args(OfficialFamily))
        raise ConfigError(f"unknown family '{family}'; the authors' checkpoints are of: {families}")
    settings = _settings(family, Path(backbone) / "config.json", image_side)
    files = {"selector": Path(selector), "predictor": Path(predictor)}
    states = {role: _StateReader(path, _pickled_state(path), family, role) for role, path in files.items()}
    if family == "vit":
        preprocessor = ImagePreprocessor(ImageSettings.of(settings))
    elif (content := tokenizer_json(path := Path(tokenizer or backbone))) is not None:
        preprocessor = TextPreprocessor(content, TextSettings(min(max_length, settings.positions)))
    else:
        raise ConfigError(f"no tokenizer at {path}; fix: --tokenizer with tokenizer.json, vocab.txt or their directory")
    origins = [f"{role} {path.name} (SHA-256 {sha256(path)}), made with the authors' code"
               for role, path in files.items()]
    unread = {role: state.unread for role, state in states.items()}
    training = {"name": Path(output).name, "stage": "imported", "origins": origins, "unread_keys": unread}
    return save(_pair(family, settings, preprocessor, states, labels), output, training=training)


def _settings(family: OfficialFamily, path: Path, image_side: int) -> BackboneConfig:
    """By the config.json of the backbone; CheckpointError: it computes otherwise than the family does."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fix: give the directory of the pretrained model, as "
                              "downloaded") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    expected = {"model_type": family, "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; the family '{family}' has {value!r}")
    try:
        return BackboneConfig(**_sizes(family, config, image_side))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit the family '{family}': {in_one_line(error)}") from None


def _sizes(family: OfficialFamily, config: dict[str, Any], image_side: int) -> dict[str, Any]:
    ours, usual_dropout, head_dropout = {"bert": ("transformers", 0.1, 0.5), "vit": ("timm", 0.0, 0.1)}[family]
    sizes = {
        "family": ours, "layers": config["num_hidden_layers"], "width": config["hidden_size"],
        "heads": config["num_attention_heads"], "feedforward": config["intermediate_size"],
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
        "dropout": config.get("hidden_dropout_prob", usual_dropout),
        "attention_dropout": config.get("attention_probs_dropout_prob", usual_dropout),
        "head_dropout": head_dropout,  # of the authors' runs; matters only if the import is trained further
    }
    if family == "bert":
        return sizes | {"positions": config["max_position_embeddings"], "vocabulary": config["vocab_size"]}
    side, channels = config["image_size"], config.get("num_channels", 3)
    native = min(image_side, side)
    image = ImageConfig(
        height=native, width=native, channels=channels, upscale_to=None if native == side else side,
        patch=config["patch_size"], **(_IMAGENET if channels == 3 else {}))
    return sizes | {"image": image}


def _pickled_state(path: Path) -> dict[str, Tensor]:
    """A pickled state dictionary, loaded so that nothing in it can run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickle protocols before it refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        # torch's own words end in advice to load the file unsafely
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f" (it names {named.group(1)})" if named else ""
        raise CheckpointError(f"{path} is not a plain state dictionary, or holds objects that could run code: "
                              f"refused{reason}; fix: save state_dict() alone") from None
    except Exception as error:  # bytes that are no pickle end in errors of many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}; is it cut off?") from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dictionary (names and tensors only)")
    return dict(state)


class _StateReader:
    """Takes tensors out of a state dictionary and says in the end what did not fit.

    CheckpointError: it is visibly of another family or role.
    """

    def __init__(self, path: Path, state: dict[str, Tensor], family: str, role: str) -> None:
        roots = {key.partition(".")[0] for key in state}
        other_family = {"bert": "vit", "vit": "bert"}[family]
        if other_family in roots and family not in roots:
            raise CheckpointError(f"{path} is of the family '{other_family}', not '{family}'; fix: name that family")
        if _other_role(roots, family, role):
            other = "predictor (their encoder)" if role == "selector" else "selector (their generator)"
            raise CheckpointError(f"{path} is a {other}, not a {role}; fix: swap the two files")
        self._path, self._state, self._mistakes = path, state, []
        without_norm = "vit.vit.layernorm." if role == "predictor" else "\0"  # their encoder of images has none
        self.unread = sorted(key for key in state if _UNREAD.match(key) or key.startswith(without_norm))
        """Keys that their forward pass does not read."""
        self._left = set(state) - set(self.unread)

    def rows(self, layer: str) -> int:
        """Outputs of a linear layer, by its weight, else its bias; 1 and a mistake noted without a weight."""
        weight = self.take(f"{layer}.weight")
        found = weight if f"{layer}.weight" in self._state else self._state.get(f"{layer}.bias", weight)
        return next(iter(found.shape), 1)

    def take(self, key: str, shape: torch.Size | None = None) -> Tensor:
        """The tensor of a key, marked as used; a key that is missing or of another shape is noted."""
        self._left.discard(key)
        tensor = self._state.get(key)
        if tensor is None:
            self._mistakes.append(f"{key} is missing")
            return torch.zeros(shape or (1,))
        if shape is not None and tensor.shape != shape:
            self._mistakes.append(f"{key} is {tuple(tensor.shape)}, the backbone's config.json asks for {tuple(shape)}")
            return torch.zeros(shape)
        if not torch.isfinite(tensor).all():
            self._mistakes.append(f"{key} holds values that are not finite")
        return tensor

    def same(self, copy: str, original: str) -> None:
        """``copy``, if there, is another name of ``original`` and must be equal to it."""
        self._left.discard(copy)
        if copy in self._state and not torch.equal(self._state[copy], self._state.get(original, torch.empty(0))):
            self._mistakes.append(f"{copy} differs from {original}, of which it is another name")

    def linear(self, key: str, layer: nn.Linear, name: str) -> dict[str, Tensor]:
        """Weight and bias of a linear layer, under our name."""
        parts = ("weight", "bias")
        return {f"{name}.{part}": self.take(f"{key}.{part}", getattr(layer, part).shape) for part in parts}

    def misfits(self) -> str:
        """Every key that is missing, misshapen or unknown, in one line; empty if all of them fit."""
        mistakes = [*dict.fromkeys(self._mistakes), *(f"{key} is unknown" for key in sorted(self._left))]
        return f"{self._path} does not fit: " + "; ".join(mistakes) if mistakes else ""


def _other_role(roots: set[str], family: str, role: str) -> bool:
    """Whether the heads are those of the other role; ``roots`` are the first parts of the keys."""
    if family == "vit":
        mine, others = ("fc", "classifier") if role == "selector" else ("classifier", "fc")
        return others in roots and mine not in roots
    return "fc" in roots and ("feature_proj" in roots) != (role == "selector")


def _pair(family: OfficialFamily, settings: BackboneConfig, preprocessor: Preprocessor, states: dict[str, _StateReader],
          labels: Sequence[str] | None) -> Rationalizer:
    selector_head, predictor_head = {"bert": ("feature_proj", "fc"), "vit": (None, "classifier")}[family]
    theirs, others = states["selector"], states["predictor"]
    own = {"head_width": theirs.rows(selector_head) if selector_head else 0}, {"final_norm": family != "vit"}
    classes = others.rows(predictor_head)
    first, second = (build_backbone(settings.model_copy(update=each), preprocessor.special_ids) for each in own)
    selector, predictor = Selector(first), Predictor(second, classes, operator="zero")
    weights = _bert_weights if family == "bert" else _vit_weights
    selector_state, predictor_state = weights(theirs, selector.backbone), weights(others, predictor.backbone)
    if family == "bert":
        selector_state |= theirs.linear("feature_proj", selector.head[0], "head.0")
    selector_state |= theirs.linear("fc", selector.head[-1], f"head.{len(selector.head) - 1}")
    predictor_state |= others.linear(predictor_head, predictor.head[-1], "head.1")
    if misfits := [found for state in states.values() if (found := state.misfits())]:
        raise CheckpointError("; ".join(misfits))
    names = [str(index) for index in range(classes)] if labels is None else [str(label) for label in labels]
    if len(names) != classes or len(set(names)) != classes:
        raise ConfigError(f"labels {names} do not fit: the predictor has {classes} classes, each needs its own name")
    for module, state in ((selector, selector_state), (predictor, predictor_state)):
        module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return Rationalizer(selector, predictor, PAPER_POLICY, preprocessor, names).eval()


def _bert_weights(state: _StateReader, backbone: Backbone) -> dict[str, Tensor]:
    """Their BERT encoder under our names. All three names of the word embeddings are one table."""
    weights = {}
    for name, own in backbone.model.state_dict().items():
        key = f"bert.bert.{name}"
        if name == "embeddings.token_type_embeddings.weight":
            shape = torch.Size((*state.take(key).shape[:1], own.shape[1]))
            table = state.take(key, shape)[: len(own)]  # only segment 0 is ever read
            weights[f"backbone.model.{name}"] = nn.functional.pad(table, (0, 0, 0, len(own) - len(table)))
        else:
            weights[f"backbone.model.{name}"] = state.take(key, own.shape)
    for copy in ("bert.embedding.weight", "embedding_layer.weight"):
        state.same(copy, "bert.bert.embeddings.word_embeddings.weight")
    return weights


def _vit_weights(state: _StateReader, backbone: Backbone) -> dict[str, Tensor]:
    """Their ViT encoder under timm's names; query, key and value become one matrix."""
    from rekd_train.models.image_encoder import timm_names  # timm takes seconds to import

    own = {name: tensor.shape for name, tensor in backbone.model.state_dict().items()}
    weights = {}
    for ours, theirs in timm_names(len(backbone.model.blocks)).items():
        if ours in own:
            shape = torch.Size((own[ours][0] // len(theirs), *own[ours][1:]))
            weights[f"backbone.model.{ours}"] = torch.cat([state.take(f"vit.vit.{name}", shape) for name in theirs])
        for name in theirs if theirs[0].startswith("embeddings.") else ():
            for prefix in ("vit.embedding.", "embedding_layer."):
                state.same(prefix + name.removeprefix("embeddings."), f"vit.vit.{name}")
    return weights
