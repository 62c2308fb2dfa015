"""Files of the authors' models as they are published: configuration, pickled weights, and what their keys mean."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rekd_train.errors import CheckpointError
from rekd_train.models.base import Backbone


def transformer_config(directory: Path, family: str) -> dict[str, Any]:
    """config.json of a model of ``transformers``.

    Raises:
        CheckpointError: missing, damaged, or a model that computes otherwise than the family does.
    """
    path = directory / "config.json"
    config = read_config(path)
    expected = {
        "model_type": family, "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; the family '{family}' has {value!r}")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give the directory of the pretrained model, as downloaded") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def transformer_sizes(config: dict[str, Any], family: str) -> dict[str, Any]:
    """Fields of ``BackboneConfig`` that a config.json of ``transformers`` decides; KeyError names a missing one."""
    sizes = {
        "family": family,
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "feedforward": config["intermediate_size"],
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    if family == "bert":
        sizes |= {"positions": config["max_position_embeddings"], "vocabulary": config["vocab_size"]}
    usual = 0.1 if family == "bert" else 0.0
    sizes["dropout"] = config.get("hidden_dropout_prob", usual)
    sizes["attention_dropout"] = config.get("attention_probs_dropout_prob", usual)
    return sizes


def pickled_state(path: Path) -> dict[str, Tensor]:
    """A pickled state dictionary, loaded so that nothing in it can run; raises CheckpointError."""
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
        raise CheckpointError(
            f"{path} is not a plain state dictionary, or holds objects that could run code: refused{reason}; "
            "fix: save state_dict() alone"
        ) from None
    except Exception as error:  # bytes that are no pickle end in errors of many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {reason}; is it cut off?") from None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dictionary (names and tensors only)")
    return dict(state)


_UNREAD = re.compile(r"^(bert\.bert|vit\.vit)\.(pooler\.|embeddings\.(position_ids|token_type_ids)$)")
"""Weights that their forward pass never reads."""
_BERT_TABLE_COPIES = ("bert.embedding.weight", "embedding_layer.weight")
_VIT_EMBEDDING_COPIES = ("vit.embedding.", "embedding_layer.")
_BERT_TABLE = "bert.bert.embeddings.word_embeddings.weight"
_BERT_SEGMENTS = "bert.bert.embeddings.token_type_embeddings.weight"


class StateReader:
    """Takes tensors out of a state dictionary and says in the end what did not fit.

    Args:
        path: for messages.
        state: names and tensors.
        family: 'bert' or 'vit'.
        role: 'selector' or 'predictor'.

    Raises:
        CheckpointError: the state is visibly of another family or role.
    """

    def __init__(self, path: Path, state: dict[str, Tensor], family: str, role: str) -> None:
        roots = {key.partition(".")[0] for key in state}
        other_family = {"bert": "vit", "vit": "bert"}[family]
        if other_family in roots and family not in roots:
            raise CheckpointError(f"{path} is of the family '{other_family}', not '{family}'; fix: name that family")
        if _other_role(roots, family, role):
            other = "predictor (their encoder)" if role == "selector" else "selector (their generator)"
            raise CheckpointError(f"{path} is a {other}, not a {role}; fix: swap the two files")
        self._path = path
        self._state = state
        self._left = set(state)
        self._mistakes: list[str] = []
        self.unread: list[str] = sorted(key for key in state if _UNREAD.match(key))
        """Keys that their forward pass does not read."""
        self._left -= set(self.unread)

    def rows(self, layer: str) -> int:
        """Outputs of a linear layer, by its weight, else its bias; 1 and a mistake noted without a weight."""
        weight, bias = self.take(f"{layer}.weight"), self._state.get(f"{layer}.bias")
        found = weight if f"{layer}.weight" in self._state or bias is None else bias
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

    def skip(self, prefix: str) -> None:
        """Keys under a prefix that this role does not read."""
        skipped = {key for key in self._left if key.startswith(prefix)}
        self._left -= skipped
        self.unread = sorted({*self.unread, *skipped})

    def same(self, copy: str, original: str) -> None:
        """``copy``, if there, is another name of ``original`` and must be equal to it."""
        self._left.discard(copy)
        if copy in self._state and not torch.equal(self._state[copy], self._state.get(original, torch.empty(0))):
            self._mistakes.append(f"{copy} differs from {original}, of which it is another name")

    def linear(self, key: str, layer: nn.Linear, name: str) -> dict[str, Tensor]:
        """Weight and bias of a linear layer, under our name."""
        return {
            f"{name}.{part}": self.take(f"{key}.{part}", getattr(layer, part).shape) for part in ("weight", "bias")
        }

    def misfits(self) -> str:
        """Every key that is missing, misshapen or unknown, in one line; empty if all of them fit."""
        mistakes = list(dict.fromkeys(self._mistakes))
        mistakes += [f"{key} is unknown" for key in sorted(self._left)]
        return f"{self._path} does not fit: " + "; ".join(mistakes) if mistakes else ""


def bert_weights(state: StateReader, backbone: Backbone) -> dict[str, Tensor]:
    """Their BERT encoder under our names. All three names of the word embeddings are one table."""
    weights = {}
    for name, own in backbone.model.state_dict().items():
        key = f"bert.bert.{name}"
        if key == _BERT_SEGMENTS:
            shape = torch.Size((*state.take(key).shape[:1], own.shape[1]))
            table = state.take(key, shape)[: len(own)]  # only segment 0 is ever read
            weights[f"backbone.model.{name}"] = nn.functional.pad(table, (0, 0, 0, len(own) - len(table)))
        else:
            weights[f"backbone.model.{name}"] = state.take(key, own.shape)
    for copy in _BERT_TABLE_COPIES:
        state.same(copy, _BERT_TABLE)
    return weights


def vit_weights(state: StateReader, backbone: Backbone) -> dict[str, Tensor]:
    """Their ViT encoder under timm's names; query, key and value become one matrix."""
    from rekd_train.models.image_encoder import timm_names  # timm takes seconds to import

    own = {name: tensor.shape for name, tensor in backbone.model.state_dict().items()}
    weights = {}
    for ours, theirs in timm_names(len(backbone.model.blocks)).items():
        if ours in own:
            shape = torch.Size((own[ours][0] // len(theirs), *own[ours][1:]))
            weights[f"backbone.model.{ours}"] = torch.cat([state.take(f"vit.vit.{name}", shape) for name in theirs])
        for name in theirs if theirs[0].startswith("embeddings.") else ():
            for prefix in _VIT_EMBEDDING_COPIES:
                state.same(prefix + name.removeprefix("embeddings."), f"vit.vit.{name}")
    if "norm.weight" not in own:
        state.skip("vit.vit.layernorm.")
    return weights


def _other_role(roots: set[str], family: str, role: str) -> bool:
    """Whether the heads are those of the other role; ``roots`` are the first parts of the keys."""
    if family == "vit":
        mine, others = ("fc", "classifier") if role == "selector" else ("classifier", "fc")
        return others in roots and mine not in roots
    return "fc" in roots and ("feature_proj" in roots) != (role == "selector")
