"""What kind of token each id of a tokenizer is: special, punctuation, or the continuation of a word. Torch-free."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass

import numpy as np

from rekd_train.inputs.text import TextPreprocessor


@dataclass(frozen=True)
class Vocabulary:
    """Facts about every id: arrays (V,) bool, V the tokenizer's size."""

    special: np.ndarray
    """[PAD], [CLS], [SEP] and the like: never part of a text."""
    punctuation: np.ndarray
    """Made of punctuation and symbols alone (Unicode categories P and S)."""
    continues: np.ndarray
    """Belongs to the word of the token before it (WordPiece's ##); with other tokenizers each token is a word."""


def vocabulary_of(preprocessor: TextPreprocessor) -> Vocabulary:
    """Read the kinds off a tokenizer's own description."""
    description = json.loads(preprocessor.tokenizer_json)
    model = description["model"]
    prefix = model.get("continuing_subword_prefix") if model.get("type", "WordPiece") == "WordPiece" else None
    special_ids = {*preprocessor.special_ids.values(), *(t["id"] for t in description["added_tokens"] if t["special"])}
    special, punctuation, continues = np.zeros((3, preprocessor.vocabulary_size), dtype=bool)
    for number in range(preprocessor.vocabulary_size):
        token = preprocessor.token(number)
        special[number] = number in special_ids
        continues[number] = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
        letters = token.removeprefix(prefix) if continues[number] else token.lstrip("Ġ▁")
        punctuation[number] = bool(letters) and all(unicodedata.category(letter)[0] in "PS" for letter in letters)
    return Vocabulary(special, punctuation & ~special, continues)
