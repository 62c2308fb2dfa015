"""Names and shapes of the weights in the authors' state dictionaries."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from rekd_train.errors import CheckpointError
from rekd_train.models.base import Backbone

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
    for name, own in backbone.bert.state_dict().items():
        key = f"bert.bert.{name}"
        if key == _BERT_SEGMENTS:
            shape = torch.Size((*state.take(key).shape[:1], own.shape[1]))
            table = state.take(key, shape)[: len(own)]  # only segment 0 is ever read
            weights[f"backbone.bert.{name}"] = nn.functional.pad(table, (0, 0, 0, len(own) - len(table)))
        else:
            weights[f"backbone.bert.{name}"] = state.take(key, own.shape)
    for copy in _BERT_TABLE_COPIES:
        state.same(copy, _BERT_TABLE)
    return weights


def vit_weights(state: StateReader, backbone: Backbone) -> dict[str, Tensor]:
    """Their ViT encoder under timm's names; query, key and value become one matrix."""
    own = {name: tensor.shape for name, tensor in backbone.vit.state_dict().items()}
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    }
    if "norm.weight" in own:
        names |= {"norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}
    for index in range(len(backbone.vit.blocks)):
        for ours, theirs in {
            "norm1": "layernorm_before", "attn.proj": "attention.output.dense", "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        }.items():
            for part in ("weight", "bias"):
                names[f"blocks.{index}.{ours}.{part}"] = f"encoder.layer.{index}.{theirs}.{part}"
    weights = {f"backbone.vit.{ours}": state.take(f"vit.vit.{theirs}", own[ours]) for ours, theirs in names.items()}
    width = backbone.settings.width
    for index in range(len(backbone.vit.blocks)):
        for part, shape in (("weight", torch.Size((width, width))), ("bias", torch.Size((width,)))):
            parts = [
                state.take(f"vit.vit.encoder.layer.{index}.attention.attention.{name}.{part}", shape)
                for name in ("query", "key", "value")
            ]
            weights[f"backbone.vit.blocks.{index}.attn.qkv.{part}"] = torch.cat(parts)
    for name in names.values():
        if name.startswith("embeddings."):
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
