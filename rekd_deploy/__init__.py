"""REKD: classifiers that say why. The deployment half.

``Client(url).predict([text])`` asks a server (``AsyncClient`` the same for asyncio),
``Pipeline(repository).predict([text])`` answers in this process, ``TritonServer(repository)`` serves. None of them
needs torch; each loads what it needs when touched.
"""

from importlib import import_module

from rekd_deploy.errors import (
    BenchmarkError,
    ClientError,
    DeadlineError,
    DeployError,
    EngineError,
    ExportError,
    InsecureServerError,
    ModelMissingError,
    ParityError,
    RejectedError,
    RepositoryError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
    VersionMismatchError,
)
from rekd_train.inputs.prediction import Piece, Prediction, Span

_LAZY = {
    "AsyncClient": "rekd_deploy.client.client",
    "Client": "rekd_deploy.client.client",
    "Pipeline": "rekd_deploy.client.pipeline",
    "RetryPolicy": "rekd_deploy.client.connection",
    "TlsSettings": "rekd_deploy.client.connection",
    "TritonServer": "rekd_deploy.server.server",
}

__all__ = [
    "AsyncClient",
    "BenchmarkError",
    "Client",
    "ClientError",
    "DeadlineError",
    "DeployError",
    "EngineError",
    "ExportError",
    "InsecureServerError",
    "ModelMissingError",
    "ParityError",
    "Piece",
    "Pipeline",
    "Prediction",
    "RejectedError",
    "RepositoryError",
    "RetryPolicy",
    "ServerBusyError",
    "ServerError",
    "ServerUnavailableError",
    "Span",
    "TlsSettings",
    "TritonServer",
    "VersionMismatchError",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rekd_deploy' has no attribute '{name}'")
