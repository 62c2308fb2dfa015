"""What every preprocessing offers, and the one place that knows them all. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rekd_train.errors import ConfigError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.inputs.token_ids import TokenIdPreprocessor, TokenIdSettings

if TYPE_CHECKING:
    from rekd_train.config.run import BackboneConfig


class Encoded(Protocol):
    """A batch of tensors that can read a mask back."""

    inputs: dict[str, np.ndarray]
    """Tensors by name, batch first."""

    def predictions(
        self, labels: Sequence[str], probabilities: np.ndarray, mask: np.ndarray, scores: np.ndarray
    ) -> list[Prediction]:
        """Model outputs (B, C), (B, N) bool, (B, N) as predictions."""


class Preprocessor(Protocol):
    """Items of one modality -> tensors; the same code in training, in process and in the client."""

    settings: Any
    """A frozen dataclass of JSON values; its ``kind`` names the preprocessing."""
    special_ids: dict[str, int]
    """Token ids that are no features, by name; empty for images."""

    @property
    def positions(self) -> int:
        """Most positions of any item, specials included."""

    @property
    def features(self) -> int:
        """Most selectable features of any item."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex): equal fingerprints give equal tensors."""

    def __call__(self, items: Sequence[Any], first_index: int = 0) -> Encoded:
        """Encode items as one batch; raises InputError that names the item, counted from ``first_index``."""

    def check_items(self, items: object) -> list[Any]:
        """``items`` as a list; raises InputError if they cannot be predicted on."""

    def check_backbone(self, settings: BackboneConfig) -> None:
        """Raise ConfigError if a network of these sizes cannot read the tensors."""

    def save(self, directory: Path) -> None:
        """Write what the settings do not hold into ``directory``."""


_KINDS = {
    "text": (TextSettings, TextPreprocessor),
    "image": (ImageSettings, ImagePreprocessor),
    "token_ids": (TokenIdSettings, TokenIdPreprocessor),
}


def load_preprocessor(directory: Path, settings: dict[str, Any]) -> Preprocessor:
    """The preprocessing of a checkpoint.

    Args:
        directory: of the checkpoint.
        settings: as in its config.json.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: an unknown kind, or settings out of range.
        TypeError, ValueError: not a dictionary, or settings that the kind does not have.
    """
    settings = dict(settings)
    kind = settings.get("kind")
    if kind not in _KINDS:
        raise ConfigError(f"unknown preprocessing '{kind}'; known: {', '.join(_KINDS)}")
    settings_class, preprocessor_class = _KINDS[kind]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return preprocessor_class.load(directory, settings_class(**values))


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

    A vocab.txt and a tokenizer.json of one model differ in what does not matter here: padding, truncation, and
    how [CLS] and [SEP] are put around a text.
    """
    if one.tokenizer_json == other.tokenizer_json:
        return True
    if one.special_ids != other.special_ids or _rules(one) != _rules(other):
        return False
    around = [each.encode(["a"])[0].ids for each in (one, other)]
    return around[0] == around[1]


def _rules(preprocessor: TextPreprocessor) -> dict[str, Any]:
    from tokenizers import Tokenizer

    whole = json.loads(Tokenizer.from_str(preprocessor.tokenizer_json).to_str())  # with every default written out
    added = [token for token in whole["added_tokens"] if not token["special"]]
    return {"added": added, **{name: whole[name] for name in ("normalizer", "pre_tokenizer", "model")}}
