"""Stands in for the text preprocessing of a model that came without its tokenizer. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rekd_train.errors import ConfigError, InputError

if TYPE_CHECKING:
    from rekd_train.config.run import BackboneConfig


@dataclass(frozen=True)
class TokenIdSettings:
    """What is known of the inputs."""

    max_length: int
    """Tokens of the longest input, specials included."""
    pad: int = 0
    """Id of [PAD]."""
    kind: str = "token_ids"


class TokenIdPreprocessor:
    """Has no tokenizer: a model over it takes ``input_ids`` and ``attention_mask`` tensors, not texts.

    Args:
        settings: length limit and padding id.
    """

    def __init__(self, settings: TokenIdSettings) -> None:
        self.settings = settings
        self.special_ids = {"pad": settings.pad}

    @property
    def positions(self) -> int:
        """Most tokens of any input."""
        return self.settings.max_length

    @property
    def features(self) -> int:
        """Most selectable tokens: all, for without a tokenizer [CLS] and [SEP] are not known as such."""
        return self.settings.max_length

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings."""
        return hashlib.sha256(json.dumps(asdict(self.settings), sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer_json(self) -> NoReturn:
        """Raises InputError: there is none."""
        self._refuse()

    def __call__(self, items: object, first_index: int = 0) -> NoReturn:
        """Raises InputError: texts cannot be read."""
        self._refuse()

    def check_items(self, items: object) -> NoReturn:
        """Raises InputError: texts cannot be read."""
        self._refuse()

    def encode(self, texts: object) -> NoReturn:
        """Raises InputError: texts cannot be read."""
        self._refuse()

    def check_backbone(self, settings: BackboneConfig) -> None:
        """Raise ConfigError if a network of these sizes cannot read such inputs."""
        if settings.image is not None or settings.positions < self.settings.max_length:
            raise ConfigError(f"the family '{settings.family}' does not read {self.settings.max_length} token ids")

    def save(self, directory: Path) -> None:
        """Nothing to write: the settings lie in the checkpoint's config.json."""

    @classmethod
    def load(cls, directory: Path, settings: TokenIdSettings) -> TokenIdPreprocessor:
        """The counterpart of ``save``."""
        return cls(settings)

    def _refuse(self) -> NoReturn:
        raise InputError(
            "this checkpoint was imported without a tokenizer, so it cannot read texts; fix: import it again with "
            "--tokenizer FILE (tokenizer.json or vocab.txt), or give input_ids to select() and class_logits()"
        )
