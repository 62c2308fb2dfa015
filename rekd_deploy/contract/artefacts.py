"""What an export hands to the repository writer: graphs and all that a client must know. torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekd_deploy.contract.signature import PairSignature
from rekd_train.inputs.preprocessors import Preprocessor


@dataclass(frozen=True)
class Artefacts:
    """A verified export, not yet placed in a repository."""

    signature: PairSignature
    selector: Path
    """selector.onnx"""
    predictor: Path
    """predictor.onnx"""
    preprocessor: Preprocessor
    """Of texts or images; its fingerprint ties clients to the model."""
    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    manifest: dict[str, Any]
    """Hashes, versions, shapes, policy, precision and parity figures (see rekd_deploy.repository.manifest)."""
    single: Path | None = None
    """single.onnx, both steps in one graph, where it was requested"""
    reference: Path | None = None
    """parity.npz, a few inputs and the PyTorch model's answers (see rekd_deploy.parity.reference)"""
    engines: Mapping[str, Path] = field(default_factory=dict)
    """<role>.plan, built from the graph of that role; all roles or none."""

    @property
    def graphs(self) -> dict[str, Path]:
        """The ONNX files by role."""
        pair = {"selector": self.selector, "predictor": self.predictor}
        return pair if self.single is None else {**pair, "single": self.single}

    @property
    def joins_lengths(self) -> bool:
        """Whether short texts may be padded to run with longer ones.

        Not where padding may be selected: more of it changes the answer. Not where an engine has several ranges of
        lengths: the predictor would get a short text with the slots of the longer one, and no profile accepts that.
        """
        if self.preprocessor.settings.kind != "text" or self.manifest.get("policy", {}).get("selectable") != "real":
            return False
        engines = [entry.get("engine", {}) for entry in self.manifest.get("artefacts", {}).values()]
        ids = [profile["input_ids"] for engine in engines for profile in engine.get("profiles", ())]
        return len({(smallest[1], largest[1]) for smallest, _, largest in ids}) <= 1
