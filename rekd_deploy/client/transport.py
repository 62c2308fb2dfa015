"""Between client and wire: what the client needs of a server, in the project's own types and errors. torch-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
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
    """What the client needs of a server. Safe to use from several threads.

    Args:
        address: of the server.
        timeout: seconds a response may take where a request says nothing else.
        headers: sent with every request, names in lower case.
    """

    def __init__(self, address: Address, timeout: float, headers: Mapping[str, str]) -> None:
        self._address, self._url = address, str(address)
        self._timeout = timeout
        self._headers = dict(headers)

    @abstractmethod
    def model_versions(self, model: str, timeout: float) -> list[str]:
        """Versions of a model that are ready.

        Args:
            timeout: seconds the response may take.

        Raises:
            ClientError: of the kind that fits.
        """

    @abstractmethod
    def model_config(self, model: str, version: str, timeout: float) -> ModelConfig:
        """Parameters and max_batch_size of a version; see ``model_versions``."""

    @abstractmethod
    def submit(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *,
        timeout: float | None = None, request_id: str = "",
    ) -> Future[Arrays]:
        """Send a request; the future holds the outputs by name or a ClientError. Cancelling it abandons the request.

        Args:
            timeout: seconds the response may take; None: as set for the transport.
            request_id: what the server's log calls the request.
        """

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *, timeout: float, request_id: str
    ) -> Arrays | None:
        """Send a request and wait for its outputs in this thread, which is quicker than to be woken by a future.

        Returns:
            None: this transport cannot, and has sent nothing.

        Raises:
            ClientError: of the kind that fits.
        """
        return None

    def server_facts(self, model: str, timeout: float) -> ServerFacts:
        """What the server says of itself, ready if the model is, too; see ``model_versions``."""
        raise RejectedError("this transport has no statistics")

    def explained(self, error: ClientError) -> ClientError:
        """An error of this transport, with what the port seems to speak where that is the mistake. May block."""
        return error

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


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
    address, headers = Address.parse(url), checked_headers(headers)
    if tls is not None and not address.encrypted:
        raise ClientError(f"'{url}' is not encrypted, but TLS settings are given; give grpcs:// or https://")
    tls = tls or TlsSettings()
    if address.protocol == "http":
        from rekd_deploy.client.transport_http import HttpTransport

        return HttpTransport(address, timeout, headers, tls)
    from rekd_deploy.client.transport_grpc import GrpcTransport

    return GrpcTransport(address, timeout, headers, tls)


def triton_inputs(input_class: type, arrays: Mapping[str, np.ndarray]) -> list:
    """The tensors as one of tritonclient's ``InferInput`` classes has them."""
    from tritonclient.utils import np_to_triton_dtype

    tensors = []
    for name, array in arrays.items():
        tensor = input_class(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        tensors.append(tensor)
    return tensors


def arrays_of(result: Any, outputs: Sequence[str], version: str) -> Arrays:
    """What a tritonclient result holds."""
    arrays = Arrays({name: result.as_numpy(name) for name in outputs})
    arrays.version = version
    return arrays


def typed_error(
    status: str, message: str, url: str, model: str, *, timeout: float, request_id: str = ""
) -> ClientError:
    """The project's error for a failure.

    Args:
        status: name of a gRPC status, or number of an HTTP status; empty: none came.
        message: what the server or the library said.
        timeout: seconds the response was given.
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
    reason = message.strip().splitlines()[0] if message.strip() else status or "no reason given"
    request = f"; request {request_id}" if request_id else ""
    named = "" if request_id in reason else request  # Triton may name it itself
    texts = {
        ServerBusyError: f"the queue of the server at {url} is full ({reason}{request}); fix: try later, or send fewer",
        ServerUnavailableError: f"no Triton server answers at {url} ({reason}); fix: check the URL, or start "
        "rekd-serve",
        InsecureServerError: f"no trusted TLS connection to {url} ({reason}); fix: the root certificate that the "
        "server's descends from, the name on it, and the client's own certificate if the server wants one",
        DeadlineError: f"no answer from {url} within {timeout:g} s ({reason}{request}); fix: a longer timeout",
        ModelMissingError: f"the server at {url} does not serve the model '{model}' ({reason})",
        RejectedError: f"the server at {url} refused the request: {reason}{named}",
    }
    return kind(texts[kind])
