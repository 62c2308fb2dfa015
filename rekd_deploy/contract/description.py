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
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor, TextSettings

LABELS = "labels"
PREPROCESSING = "preprocessing"
TOKENIZER = "tokenizer"
FINGERPRINT = "preprocessing_sha256"
VERSION = "rekd_version"


@dataclass(frozen=True)
class ServedDescription:
    """Everything between a text or image and the tensors, and between the tensors and a prediction."""

    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    settings: TextSettings | ImageSettings
    """Lengths of texts, or size and patch grid of images."""
    tokenizer_json: str
    """Content of tokenizer.json; empty for images."""
    fingerprint: str
    """``Preprocessor.fingerprint`` of the model: clients with another one see other tensors."""
    rekd_version: str = ""
    """Version of rekd that wrote the repository."""

    @classmethod
    def of(cls, preprocessor: Preprocessor, labels: tuple[str, ...]) -> ServedDescription:
        """Describe a model by its preprocessor and labels."""
        from rekd_train import __version__

        tokenizer_json = preprocessor.tokenizer_json if preprocessor.settings.kind == "text" else ""
        return cls(tuple(labels), preprocessor.settings, tokenizer_json, preprocessor.fingerprint, __version__)

    def to_parameters(self) -> dict[str, str]:
        """The description as config.pbtxt parameters (string values)."""
        parameters = {
            LABELS: json.dumps(self.labels, ensure_ascii=False),
            PREPROCESSING: json.dumps(asdict(self.settings)),
            FINGERPRINT: self.fingerprint,
            VERSION: self.rekd_version,
        }
        if self.tokenizer_json:
            packed = zlib.compress(self.tokenizer_json.encode(), 9)
            parameters[TOKENIZER] = base64.b64encode(packed).decode("ascii")
        return parameters

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServedDescription:
        """Read the description back.

        Raises:
            RepositoryError: a parameter is missing or cannot be read.
        """
        _require(parameters, LABELS, PREPROCESSING, FINGERPRINT)
        try:
            preprocessing = json.loads(parameters[PREPROCESSING])
            tokenizer_json = ""
            if preprocessing.get("kind") == "text":
                _require(parameters, TOKENIZER)
                settings = TextSettings(**{**preprocessing, "lengths": tuple(preprocessing["lengths"])})
                tokenizer_json = zlib.decompress(base64.b64decode(parameters[TOKENIZER], validate=True)).decode()
            elif preprocessing.get("kind") == "image":
                settings = ImageSettings(**preprocessing)
            else:
                raise ValueError(f"preprocessing kind {preprocessing.get('kind')!r} is unknown to this version of rekd")
            labels = tuple(str(label) for label in json.loads(parameters[LABELS]))
        except RepositoryError:
            raise
        except (
            AttributeError, KeyError, TypeError, ValueError, binascii.Error, zlib.error, RekdError,
        ) as error:
            raise RepositoryError(
                f"the ensemble's parameters cannot be read ({error}); fix: use the version of rekd that wrote them "
                f"({parameters.get(VERSION) or 'unknown'})"
            ) from None
        return cls(labels, settings, tokenizer_json, parameters[FINGERPRINT], parameters.get(VERSION, ""))

    def preprocessor(self) -> Preprocessor:
        """The model's own preprocessing.

        Raises:
            RepositoryError: it is not the one the model was trained with.
        """
        try:
            if isinstance(self.settings, ImageSettings):
                preprocessor: Preprocessor = ImagePreprocessor(self.settings)
            else:
                preprocessor = TextPreprocessor(self.tokenizer_json, self.settings)
            fingerprint = preprocessor.fingerprint
        except (RekdError, ValueError) as error:
            raise RepositoryError(f"the ensemble's preprocessing cannot be used: {error}") from None
        if fingerprint != self.fingerprint:
            raise RepositoryError(
                f"the ensemble's preprocessing has the fingerprint {fingerprint[:12]}, but the model was "
                f"trained with {self.fingerprint[:12]}; fix: write the repository again with rekd-export"
            )
        return preprocessor


def _require(parameters: Mapping[str, str], *keys: str) -> None:
    missing = [key for key in keys if key not in parameters]
    if missing:
        raise RepositoryError(
            f"the ensemble's config has no parameter {', '.join(missing)}; fix: write the repository again with "
            "rekd-export"
        )
