"""Between client and wire: what the client needs of a server, in the project's own types and errors. torch-free."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rekd_deploy.client.connection import Address, TlsSettings, checked_headers
from rekd_deploy.errors import (
    ClientError,
    DeadlineError,
    InsecureServerError,
    ModelMissingError,
    RejectedError,
    ServerBusyError,
    ServerUnavailableError,
)

WORKERS = 64
"""Most submitted requests of one client on their way at once, each in a thread; the others wait their turn."""
_STATUS_ERRORS = {
    "UNAVAILABLE": ServerUnavailableError,
    "CANCELLED": ServerUnavailableError,  # not by us: the server stopped in the middle
    "DEADLINE_EXCEEDED": DeadlineError,
    "NOT_FOUND": ModelMissingError,
    "404": ModelMissingError,
    "429": ServerBusyError,
    "499": DeadlineError,
    "502": ServerUnavailableError,
    "503": ServerUnavailableError,
    "504": DeadlineError,
}
_QUEUE_FULL = "Exceeds maximum queue size"
_RESTRICTED = "This protocol is restricted"
"""What Triton's gRPC says, as UNAVAILABLE, to a request without the key that the interface takes."""
_TLS_SIGNS = ("handshake failed", "verification check failed", "certificate_verify_failed", "peer name")
"""What gRPC says, whose status for these is UNAVAILABLE."""


class Arrays(dict[str, np.ndarray]):
    """The outputs of a request by name."""

    version: str = ""
    """Version of the model that computed them."""


@dataclass(frozen=True)
class Request:
    """What a server is asked; without inputs: for something it knows."""

    model: str
    timeout: float
    """Seconds from now that the response may take."""
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    outputs: Sequence[str] = ()
    request_id: str = ""
    """What the server's log calls the request."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return self.begun + self.timeout - time.monotonic()


class ModelConfig(NamedTuple):
    """What a served model says of itself."""

    parameters: dict[str, str]
    max_batch_size: int


class ServerFacts(NamedTuple):
    """What a server says of itself."""

    triton: str
    """Triton's version."""
    ready: bool
    """It is ready, and so is the model."""
    statistics: list[dict[str, Any]]
    """Triton's ``model_stats``."""


class Transport(ABC):
    """What the client needs of a server. Safe to use from several threads; every method raises ClientErrors.

    Args:
        address: of the server.
        timeout: seconds a response may take where a request says nothing else.
        headers: sent with every request, names in lower case.
    """

    ends_in_time = False
    """Whether ``infer`` keeps the timeout whatever the server does, so that a thread may wait for it."""

    def __init__(self, address: Address, timeout: float, headers: Mapping[str, str]) -> None:
        self._url = str(address)
        self._timeout = timeout
        self._headers = dict(headers)
        self._workers = ThreadPoolExecutor(WORKERS, "rekd-transport")

    @abstractmethod
    def model_versions(self, model: str, timeout: float) -> list[str]:
        """Versions of a model that are ready; ``timeout``: seconds the response may take."""

    @abstractmethod
    def model_config(self, model: str, version: str, timeout: float) -> ModelConfig:
        """Parameters and max_batch_size of a version; see ``model_versions``."""

    @abstractmethod
    def infer(self, request: Request) -> Arrays:
        """Send a request and wait for its outputs in this thread."""

    def server_facts(self, model: str, timeout: float) -> ServerFacts:
        """What the server says of itself, ready if the model is, too; see ``model_versions``."""
        raise NotImplementedError

    def submit(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *,
        timeout: float | None = None, request_id: str = "", wait: bool = False,
    ) -> Future[Arrays]:
        """``infer`` in a thread; cancelling the future abandons the request. For arguments see ``Request``.

        Args:
            wait: for the response, in this thread, which is quicker than to be woken; where it ``ends_in_time``.
        """
        request = Request(model, self._timeout if timeout is None else timeout, inputs, outputs, request_id)
        future: Future[Arrays] = Future()

        def work() -> None:
            if future.cancelled():
                return
            with suppress(InvalidStateError):  # cancelled meanwhile
                try:
                    future.set_result(self.infer(request))
                except Exception as error:
                    future.set_exception(error)

        if wait and self.ends_in_time:
            work()
            return future
        try:
            self._workers.submit(work)
        except RuntimeError as error:  # closed meanwhile
            future.set_exception(self._unusable(error))
        return future

    def close(self) -> None:
        """Close the connections; requests on their way fail."""
        self._workers.shutdown()

    def _unusable(self, error: Exception) -> ServerUnavailableError:
        return ServerUnavailableError(f"the connection to {self._url} cannot be used ({error})")

    def _failure(self, request: Request, status: str, message: str) -> ClientError:
        """The project's error for a failure.

        Args:
            status: name of a gRPC status, or number of an HTTP status; empty: none came.
            message: what the server or the library said.
        """
        kind = _STATUS_ERRORS.get(status, RejectedError)
        if _QUEUE_FULL in message:
            kind = ServerBusyError
        elif _RESTRICTED in message:
            kind = RejectedError
        elif kind is ServerUnavailableError and any(sign in message.lower() for sign in _TLS_SIGNS):
            kind = InsecureServerError
        elif "unknown model" in message:
            kind = ModelMissingError
        url, reason = self._url, message.strip().partition("\n")[0] or status or "no reason given"
        if request.request_id and request.request_id not in reason:  # Triton may name it itself
            reason += f"; request {request.request_id}"
        texts = {
            ServerBusyError: f"the queue of the server at {url} is full ({reason}); fix: try later, or send fewer",
            ServerUnavailableError: f"no Triton server answers at {url} ({reason}); fix: start rekd-serve, or check "
            "the address: HOST:8001 for gRPC, http://HOST:8000 for HTTP, with TLS grpcs:// or https://",
            InsecureServerError: f"no trusted TLS connection to {url} ({reason}); fix: the root certificate that the "
            "server's descends from, the name on it, the client's own certificate if the server wants one, or an "
            "address without TLS if the server has none",
            DeadlineError: f"no answer from {url} within {request.timeout:g} s ({reason}); fix: a longer timeout",
            ModelMissingError: f"the server at {url} does not serve the model '{request.model}' ({reason})",
            RejectedError: f"the server at {url} refused the request: {reason}",
        }
        return kind(texts[kind])


def open_transport(
    url: str, timeout: float, *, headers: Mapping[str, str] | None = None, tls: TlsSettings | None = None
) -> Transport:
    """gRPC for HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT, HTTP for http://HOST:PORT or https://HOST:PORT.

    Args:
        timeout: seconds a response may take.
        headers: sent with every request.
        tls: for grpcs:// and https://.

    Raises:
        ClientError: the address is none, or headers or TLS settings cannot be used.
    """
    from rekd_deploy.client.protocols import GrpcTransport, HttpTransport

    address = Address.parse(url)
    if tls is not None and not address.encrypted:
        raise ClientError(f"'{url}' is not encrypted, but TLS settings are given; give grpcs:// or https://")
    kind = HttpTransport if address.protocol == "http" else GrpcTransport
    return kind(address, timeout, checked_headers(headers), tls or TlsSettings())
