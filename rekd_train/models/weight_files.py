"""Files of pretrained models as they are published: config.json, weights, tokenizer."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rekd_train.errors import CheckpointError
from rekd_train.inputs.text import TOKENIZER_FILE

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In a directory, in the order of preference."""
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Red, green and blue of its images, in 0..1."""


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


def image_normalisation(directory: Path) -> dict[str, list[float]]:
    """'mean' and 'std' of the images that a network was trained on, as far as the files beside its weights say.

    ``transformers`` writes them in preprocessor_config.json, ``timm`` in config.json.
    """
    found: dict[str, list[float]] = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (directory / name).is_file():
            config = read_config(directory / name)
            config = config | (config.get("pretrained_cfg") or {})
            values = {each: config.get(f"image_{each}", config.get(each)) for each in ("mean", "std")}
            found |= {each: list(value) for each, value in values.items() if isinstance(value, list)}
    return found


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


def read_state(path: Path) -> dict[str, Tensor]:
    """Weights of a file, or of the directory that holds one: safetensors, or a pickle of tensors only.

    Raises:
        CheckpointError: missing, damaged or unsafe.
    """
    if path.is_dir():
        found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path} holds neither {' nor '.join(WEIGHT_FILES)} (weights in one file)")
        path = found
    if path.suffix != ".safetensors":
        return pickled_state(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be cut off; fix: download it again") from None


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


def tokenizer_json(path: Path) -> str | None:
    """Content of a tokenizer.json, given itself, by a vocab.txt (BERT's) or by a directory with either.

    Returns:
        None if there is none.

    Raises:
        CheckpointError: damaged.
    """
    candidates = [path / TOKENIZER_FILE, path / "vocab.txt"] if path.is_dir() else [path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        return None
    try:
        if found.suffix == ".json":
            return found.read_text(encoding="utf-8")
        from tokenizers import BertWordPieceTokenizer

        beside = found.with_name("tokenizer_config.json")
        options = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        return BertWordPieceTokenizer(str(found), lowercase=options.get("do_lower_case", True)).to_str()
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{found} cannot be read as a tokenizer: {error}") from None
