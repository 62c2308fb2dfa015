"""What an export hands to the repository writer: graphs and all that a client must know. torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekd_deploy.signature import PairSignature
from rekd_train.preprocess import TextPreprocessor


@dataclass(frozen=True)
class Artefacts:
    """A verified export, not yet placed in a repository."""

    signature: PairSignature
    selector: Path
    """selector.onnx"""
    predictor: Path
    """predictor.onnx"""
    preprocessor: TextPreprocessor
    """Tokenizer and settings; its fingerprint ties clients to the model."""
    labels: tuple[str, ...]
    """Class names in the order of the logits."""
    manifest: dict[str, Any]
    """Hashes, versions, shapes, policy, precision and parity figures (see rekd_deploy.manifest)."""
