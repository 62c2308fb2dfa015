"""REKD: classifiers that say why. The deployment half.

``Client(url).predict([text])`` asks a server, ``Pipeline(repository).predict([text])`` answers in this
process, ``TritonServer(repository)`` serves. None of them needs torch; each loads what it needs when touched.
"""

from importlib import import_module

from rekd_deploy.errors import (
    BenchmarkError,
    ClientError,
    DeadlineError,
    DeployError,
    EngineError,
    ExportError,
    ModelMissingError,
    ParityError,
    RejectedError,
    RepositoryError,
    ServerError,
    ServerUnavailableError,
    VersionMismatchError,
)
from rekd_train.prediction import Piece, Prediction, Span

_LAZY = {
    "Client": "rekd_deploy.client",
    "Pipeline": "rekd_deploy.pipeline",
    "TritonServer": "rekd_deploy.server",
}

__all__ = [
    "BenchmarkError",
    "Client",
    "ClientError",
    "DeadlineError",
    "DeployError",
    "EngineError",
    "ExportError",
    "ModelMissingError",
    "ParityError",
    "Piece",
    "Pipeline",
    "Prediction",
    "RejectedError",
    "RepositoryError",
    "ServerError",
    "ServerUnavailableError",
    "Span",
    "TritonServer",
    "VersionMismatchError",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rekd_deploy' has no attribute '{name}'")
