"""The one place that knows every preprocessing, and what tokens are. Torch-free."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rekd_train.errors import ConfigError
from rekd_train.inputs.image import EncodedImages, ImagePreprocessor, ImageSettings
from rekd_train.inputs.text import EncodedTexts, TextPreprocessor, TextSettings

Preprocessor = TextPreprocessor | ImagePreprocessor
"""Items of one modality -> tensors; the same code in training, in process and in the client.

All have ``settings`` (a frozen dataclass of JSON values; its ``kind`` names the preprocessing), ``special_ids``,
``positions``, ``features``, ``fingerprint``, ``check_items``, ``check_backbone``, and encode items when called.
"""
Encoded = EncodedTexts | EncodedImages
"""A batch: ``inputs`` (tensors by name, batch first), and ``predictions``, which reads a mask back."""


def load_preprocessor(directory: Path, settings: dict[str, Any]) -> Preprocessor:
    """The preprocessing of the checkpoint in a directory, with the settings of its config.json.

    CheckpointError: a file is missing or damaged; ConfigError: an unknown kind, or settings out of range; TypeError,
    ValueError: not a dictionary, or settings that the kind does not have.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in dict(settings).items()}
    match values.get("kind"):
        case "text":
            return TextPreprocessor.load(directory, TextSettings(**values))
        case "image":
            return ImagePreprocessor(ImageSettings(**values))
        case kind:
            raise ConfigError(f"unknown preprocessing '{kind}'; known: text, image")


def full_length(inputs: dict[str, np.ndarray], preprocessor: Preprocessor) -> dict[str, np.ndarray]:
    """Token inputs as wide as the preprocessing allows; images as they are.

    Where padding may be selected it counts, so every batch must hold as much of it.
    """
    if "input_ids" not in inputs:
        return inputs
    missing = preprocessor.positions - inputs["input_ids"].shape[1]
    fill = {"input_ids": preprocessor.special_ids["pad"], "attention_mask": 0}
    return {name: np.pad(array, ((0, 0), (0, missing)), constant_values=fill[name]) for name, array in inputs.items()}


def same_tokens(one: TextPreprocessor, other: TextPreprocessor) -> bool:
    """Whether two tokenizers make the same tokens of every text, however their files are written.

    A vocab.txt and a tokenizer.json of one model differ in padding, truncation, and how [CLS] and [SEP] are put around.
    """
    same = one.special_ids == other.special_ids and _rules(one) == _rules(other)
    return same and one.encode(["a"])[0].ids == other.encode(["a"])[0].ids


def _rules(preprocessor: TextPreprocessor) -> dict[str, Any]:
    from tokenizers import Tokenizer

    whole = json.loads(Tokenizer.from_str(preprocessor.tokenizer_json).to_str())  # with every default written out
    added = [token for token in whole["added_tokens"] if not token["special"]]
    return {"added": added, **{name: whole[name] for name in ("normalizer", "pre_tokenizer", "model")}}


_WORD_STARTS = "Ġ▁"  # how byte-level and SentencePiece vocabularies write the space before a word


@dataclass(frozen=True)
class Vocabulary:
    """Facts about every id: arrays (V,) bool, V the tokenizer's size."""

    special: np.ndarray  # [PAD], [CLS], [SEP] and the like: never part of a text
    punctuation: np.ndarray  # made of punctuation and symbols alone (Unicode categories P and S)
    continues: np.ndarray  # belongs to the word of the token before it, as far as its vocabulary entry tells


def vocabulary_of(preprocessor: TextPreprocessor) -> Vocabulary:
    """Read the kinds off a tokenizer's own description."""
    description = json.loads(preprocessor.tokenizer_json)
    model = description["model"]
    prefix = model.get("continuing_subword_prefix") if model.get("type", "WordPiece") == "WordPiece" else None
    tokens = [preprocessor.token(number) for number in range(preprocessor.vocabulary_size)]
    marked = any(token.startswith(tuple(_WORD_STARTS)) for token in tokens)
    special_ids = {*preprocessor.special_ids.values(), *(t["id"] for t in description["added_tokens"] if t["special"])}
    special, punctuation, continues = np.zeros((3, preprocessor.vocabulary_size), dtype=bool)
    for number, token in enumerate(tokens):
        special[number] = number in special_ids
        inside = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
        letters = token.removeprefix(prefix) if inside else token.lstrip(_WORD_STARTS)
        continues[number] = inside or (marked and letters == token and letters.isalnum())
        punctuation[number] = bool(letters) and all(unicodedata.category(letter)[0] in "PS" for letter in letters)
    return Vocabulary(special, punctuation & ~special, continues)
