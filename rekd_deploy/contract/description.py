"""What an export hands to the repository writer, and what a served model says about itself. torch-free.

The description travels as parameters of the ensemble's config.pbtxt, so that a client needs nothing but an address:
``Client`` reads it from the server, ``Pipeline`` from the file.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rekd_deploy.contract.signature import PairSignature
from rekd_deploy.errors import RepositoryError
from rekd_train import __version__
from rekd_train.errors import RekdError
from rekd_train.inputs.familiarity import Familiarity
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor, TextSettings

LABELS, PREPROCESSING, TOKENIZER, FAMILIARITY = "labels", "preprocessing", "tokenizer", "familiarity"
FINGERPRINT, VERSION, BUDGET = "preprocessing_sha256", "rekd_version", "budget"


@dataclass(frozen=True)
class Artefacts:
    """A verified export, not yet placed in a repository."""

    signature: PairSignature
    selector: Path
    """selector.onnx; ``predictor`` likewise."""
    predictor: Path
    preprocessor: Preprocessor
    """Of texts or images; its fingerprint ties clients to the model."""
    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    manifest: dict[str, Any]
    """Hashes, versions, shapes, policy, precision and parity figures (see rekd_deploy.repository.manifest)."""
    single: Path | None = None
    """single.onnx, both steps in one graph, where it was requested."""
    reference: Path | None = None
    """parity.npz, a few inputs and the PyTorch model's answers (see rekd_deploy.parity.reference)."""
    engines: Mapping[str, Path] = field(default_factory=dict)
    """<role>.plan, built from the graph of that role; all roles or none."""

    @property
    def graphs(self) -> dict[str, Path]:
        """The ONNX files by role."""
        pair = {"selector": self.selector, "predictor": self.predictor}
        return pair if self.single is None else {**pair, "single": self.single}

    @property
    def description(self) -> ServedDescription:
        """What the served model will say about itself."""
        budget = self.manifest.get("policy", {}).get("budget")
        return ServedDescription.of(self.preprocessor, self.labels, budget)

    @property
    def joins_lengths(self) -> bool:
        """Whether short texts may be padded to run with longer ones.

        Not where padding may be selected: more of it changes the answer. Not where an engine has several ranges of
        lengths: no profile of the predictor accepts a short text with the slots of a longer one.
        """
        if self.preprocessor.settings.kind != "text" or self.manifest.get("policy", {}).get("selectable") != "real":
            return False
        engines = [entry.get("engine", {}) for entry in self.manifest.get("artefacts", {}).values()]
        ids = [profile["input_ids"] for engine in engines for profile in engine.get("profiles", ())]
        return len({(smallest[1], largest[1]) for smallest, _, largest in ids}) <= 1


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
    familiarity: str = ""
    """``Familiarity.packed``; empty where it is not known what texts are usual."""
    budget: float | None = None
    """Largest share of the words or patches that is kept, short inputs aside; None: no limit, or not known."""

    @classmethod
    def of(
        cls, preprocessor: Preprocessor, labels: tuple[str, ...], budget: float | None = None
    ) -> ServedDescription:
        """Describe a model by its preprocessor, its labels and its rule's limit."""
        tokenizer_json = familiarity = ""
        if isinstance(preprocessor, TextPreprocessor):
            tokenizer_json, known = preprocessor.tokenizer_json, preprocessor.familiarity
            familiarity = "" if known is None else known.packed()
        settings, fingerprint = preprocessor.settings, preprocessor.fingerprint
        return cls(tuple(labels), settings, tokenizer_json, fingerprint, familiarity, budget)

    def reads_as(self, other: ServedDescription) -> bool:
        """Whether the two models take the same tensors for an item and answer with the same labels."""
        return (self.labels, self.fingerprint) == (other.labels, other.fingerprint)

    def to_parameters(self) -> dict[str, str]:
        """The description as config.pbtxt parameters (string values)."""
        parameters = {
            LABELS: json.dumps(self.labels, ensure_ascii=False), PREPROCESSING: json.dumps(asdict(self.settings)),
            FINGERPRINT: self.fingerprint, VERSION: __version__,
        }
        if self.tokenizer_json:
            packed = zlib.compress(self.tokenizer_json.encode(), 9)
            parameters[TOKENIZER] = base64.b64encode(packed).decode("ascii")
        if self.familiarity:
            parameters[FAMILIARITY] = self.familiarity
        if self.budget is not None:
            parameters[BUDGET] = str(self.budget)
        return parameters

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> ServedDescription:
        """Read the description back; RepositoryError: a parameter is missing or cannot be read."""
        tokenizer_json = ""
        try:
            settings = json.loads(parameters[PREPROCESSING])
            kind = settings.get("kind")
            if kind not in ("text", "image"):
                raise ValueError(f"preprocessing kind {kind!r} is unknown to this version of rekd")
            if kind == "text":
                tokenizer_json = zlib.decompress(base64.b64decode(parameters[TOKENIZER], validate=True)).decode()
                settings = TextSettings(**{**settings, "lengths": tuple(settings["lengths"])})
            else:
                settings = ImageSettings(**settings)
            labels = tuple(map(str, json.loads(parameters[LABELS])))
            familiarity, budget = parameters.get(FAMILIARITY, ""), parameters.get(BUDGET)
            limit = None if budget is None else float(budget)
            return cls(labels, settings, tokenizer_json, parameters[FINGERPRINT], familiarity, limit)
        except KeyError as error:
            reason = f"the ensemble's config has no parameter {error.args[0]}"
        except (AttributeError, TypeError, ValueError, zlib.error, RekdError) as error:
            reason = f"the ensemble's parameters cannot be read ({error})"
        written_by = parameters.get(VERSION) or "unknown"
        raise RepositoryError(f"{reason}; fix: use the version of rekd that wrote them ({written_by}), or export again")

    def preprocessor(self) -> Preprocessor:
        """The model's own preprocessing; RepositoryError: it is not the one the model was trained with."""
        try:
            preprocessor: Preprocessor = (
                ImagePreprocessor(self.settings) if isinstance(self.settings, ImageSettings)
                else TextPreprocessor(self.tokenizer_json, self.settings,
                                      Familiarity.unpacked(self.familiarity) if self.familiarity else None)
            )
            fingerprint = preprocessor.fingerprint
        except (RekdError, ValueError) as error:
            raise RepositoryError(f"the ensemble's preprocessing cannot be used: {error}") from None
        if fingerprint != self.fingerprint:
            raise RepositoryError(
                f"the ensemble's preprocessing has the fingerprint {fingerprint[:12]}, but the model was "
                f"trained with {self.fingerprint[:12]}; fix: write the repository again with rekd-export"
            )
        return preprocessor
