"""What a served model says about itself, so that a client needs nothing but its address. torch-free.

The description travels as parameters of the ensemble's config.pbtxt. ``Client`` reads it from the
server, ``Pipeline`` from the file.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rekd_deploy.errors import RepositoryError
from rekd_train.errors import RekdError
from rekd_train.preprocess import TextPreprocessor, TextSettings

LABELS = "labels"
PREPROCESSING = "preprocessing"
TOKENIZER = "tokenizer"
FINGERPRINT = "preprocessing_sha256"
CAPACITY = "capacity"
VERSION = "rekd_version"


@dataclass(frozen=True)
class ServedDescription:
    """Everything between a text and the tensors, and between the tensors and a prediction."""

    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    settings: TextSettings
    """Length limits of the preprocessing."""
    tokenizer_json: str
    """Content of tokenizer.json."""
    fingerprint: str
    """``TextPreprocessor.fingerprint`` of the model: clients with another one see other tokens."""
    capacity: int
    """K, most tokens that a rationale can hold."""
    rekd_version: str = ""
    """Version of rekd that wrote the repository."""

    @classmethod
    def of(cls, preprocessor: TextPreprocessor, labels: tuple[str, ...], capacity: int) -> ServedDescription:
        """Describe a model by its preprocessor, labels and capacity."""
        from rekd_train import __version__

        return cls(
            tuple(labels), preprocessor.settings, preprocessor.tokenizer_json, preprocessor.fingerprint, capacity,
            __version__,
        )

    def to_parameters(self) -> dict[str, str]:
        """The description as config.pbtxt parameters (string values)."""
        return {
            LABELS: json.dumps(self.labels, ensure_ascii=False),
            PREPROCESSING: json.dumps(asdict(self.settings)),
            FINGERPRINT: self.fingerprint,
            CAPACITY: str(self.capacity),
            VERSION: self.rekd_version,
            TOKENIZER: base64.b64encode(zlib.compress(self.tokenizer_json.encode(), 9)).decode("ascii"),
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServedDescription:
        """Read the description back.

        Raises:
            RepositoryError: a parameter is missing or cannot be read.
        """
        required = (LABELS, PREPROCESSING, TOKENIZER, FINGERPRINT, CAPACITY)
        missing = [key for key in required if key not in parameters]
        if missing:
            raise RepositoryError(
                f"the ensemble's config has no parameter {', '.join(missing)}; fix: write the repository again with "
                "rekd-export"
            )
        try:
            preprocessing = json.loads(parameters[PREPROCESSING])
            if preprocessing.get("kind") != "text":
                raise ValueError(f"preprocessing kind {preprocessing.get('kind')!r} is unknown to this version of rekd")
            settings = TextSettings(**{**preprocessing, "lengths": tuple(preprocessing["lengths"])})
            labels = tuple(str(label) for label in json.loads(parameters[LABELS]))
            tokenizer_json = zlib.decompress(base64.b64decode(parameters[TOKENIZER], validate=True)).decode()
            capacity = int(parameters[CAPACITY])
        except (
            AttributeError, KeyError, TypeError, ValueError, binascii.Error, zlib.error, RekdError,
        ) as error:
            raise RepositoryError(
                f"the ensemble's parameters cannot be read ({error}); fix: use the version of rekd that wrote them "
                f"({parameters.get(VERSION) or 'unknown'})"
            ) from None
        return cls(labels, settings, tokenizer_json, parameters[FINGERPRINT], capacity, parameters.get(VERSION, ""))

    def preprocessor(self) -> TextPreprocessor:
        """The model's own preprocessing.

        Raises:
            RepositoryError: it is not the one the model was trained with.
        """
        try:
            preprocessor = TextPreprocessor(self.tokenizer_json, self.settings)
            fingerprint = preprocessor.fingerprint
        except (RekdError, ValueError) as error:
            raise RepositoryError(f"the ensemble's tokenizer cannot be used: {error}") from None
        if fingerprint != self.fingerprint:
            raise RepositoryError(
                f"the ensemble's tokenizer and settings have fingerprint {fingerprint[:12]}, but the model was "
                f"trained with {self.fingerprint[:12]}; fix: write the repository again with rekd-export"
            )
        return preprocessor
