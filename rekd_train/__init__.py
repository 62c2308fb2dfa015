"""REKD: classifiers that say why. The training half.

``load(path)`` turns a checkpoint into a ``Rationalizer``. torch is imported when first needed.
"""

from importlib import import_module

from rekd_train.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    MissingExtraError,
    RekdError,
    TrainingError,
)
from rekd_train.inputs.prediction import Patch, Piece, Prediction, Span

__version__ = "0.1.0"

_LAZY = {
    "Rationalizer": "rekd_train.models.rationalizer",
    "Selection": "rekd_train.models.rationalizer",
    "SelectionPolicy": "rekd_train.inputs.policy",
    "load": "rekd_train.checkpoints.checkpoint",
}

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "InputError", "MissingExtraError", "Patch", "Piece", "Prediction",
    "Rationalizer", "RekdError", "Selection", "SelectionPolicy", "Span", "TrainingError", "load",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:  # torch, say
            from rekd_train.errors import missing_extra

            raise missing_extra((error.name or "").partition(".")[0], "train") or error from None
    raise AttributeError(f"module 'rekd_train' has no attribute '{name}'")
