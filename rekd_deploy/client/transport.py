"""Between client and wire: what the client needs of a server, in the project's own types and errors. torch-free."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rekd_deploy import errors
from rekd_deploy.client.connection import Address, TlsSettings, checked_headers
from rekd_deploy.errors import ClientError, DeadlineError, InsecureServerError, ModelMissingError, RejectedError

WORKERS = 64
"""Most submitted requests of one client on their way at once, each in a thread; the others wait their turn."""
_STATUS_ERRORS = {
    **dict.fromkeys(("UNAVAILABLE", "502", "503"), errors.ServerUnavailableError),
    "CANCELLED": errors.ServerUnavailableError,  # not by us: the server stopped in the middle
    **dict.fromkeys(("DEADLINE_EXCEEDED", "499", "504"), DeadlineError),
    **dict.fromkeys(("NOT_FOUND", "404"), ModelMissingError),
    "429": errors.ServerBusyError,
}
_QUEUE_FULL = "Exceeds maximum queue size"
_RESTRICTED = "This protocol is restricted"
"""What Triton's gRPC says, as UNAVAILABLE, to a request without the key that the interface takes."""
_PASSING = ("is not at ready state", "is not healthy")
"""What Triton says of a model that is being loaded or leaves, and of one whose process has died, until it is back."""
_TLS_SIGNS = ("handshake failed", "verification check failed", "certificate_verify_failed", "peer name")
"""What gRPC says, whose status for these is UNAVAILABLE."""


class Arrays(dict[str, np.ndarray]):
    """The outputs of a request by name."""

    version: str = ""
    """Version of the model that computed them."""


@dataclass(frozen=True)
class Request:
    """What a server is asked, and the seconds from now that its response may take; its log has ``request_id``."""

    model: str
    timeout: float
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    request_id: str = ""
    version: str = ""
    """Of the model; empty: the server's choice, the newest."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return self.begun + self.timeout - time.monotonic()


class Transport(ABC):
    """What the client needs of a server. Safe to use from several threads; every method raises ClientErrors.

    ``timeout``: seconds a response may take where a request says nothing else; ``headers`` are sent with every request.
    """

    ends_in_time = False
    """Whether ``infer`` keeps the timeout whatever the server does, so that a thread may wait for it."""

    def __init__(self, address: Address, timeout: float, headers: Mapping[str, str]) -> None:
        self._url = str(address)
        self._timeout = timeout
        self._headers = dict(headers)
        self._workers = ThreadPoolExecutor(WORKERS, "rekd-transport")

    @abstractmethod
    def infer(self, request: Request) -> Arrays:
        """Send a request and wait for its outputs in this thread."""

    @abstractmethod
    def _told(self, what: str, request: Request, version: str = "") -> dict[str, Any]:
        """What Triton says of 'server', 'statistics', 'model' or 'config', as its HTTP has it."""

    @abstractmethod
    def _is_ready(self, request: Request) -> bool:
        """Whether the server is, and the model."""

    def model_versions(self, model: str, timeout: float) -> list[str]:
        """Versions of a model that are ready; ``timeout``: seconds the response may take."""
        with self._reading():
            return [str(version) for version in self._told("model", Request(model, timeout)).get("versions", ())]

    def model_config(self, model: str, version: str, timeout: float) -> tuple[dict[str, str], int]:
        """Parameters and max_batch_size of a version; see ``model_versions``."""
        with self._reading():
            config = self._told("config", Request(model, timeout), version)
            parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
            return parameters, int(config.get("max_batch_size", 0))

    def server_facts(self, model: str, timeout: float) -> tuple[str, bool, list[dict[str, Any]]]:
        """Triton's version, whether server and model are ready, Triton's ``model_stats``; see ``model_versions``."""
        request = Request(model, timeout)
        with self._reading():
            triton, statistics = (self._told(what, request) for what in ("server", "statistics"))
            return triton["version"], self._is_ready(request), statistics["model_stats"]

    def submit(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *,
        timeout: float | None = None, request_id: str = "", version: str = "", wait: bool = False,
    ) -> Future[Arrays]:
        """``infer`` in a thread; cancelling the future abandons the request. For arguments see ``Request``.

        ``wait``: in this thread, which is quicker than to be woken, if it ``ends_in_time``.
        """
        request = Request(model, self._timeout if timeout is None else timeout, inputs, outputs, request_id, version)
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

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever goes wrong while a response is read, it is none of Triton's."""
        try:
            yield
        except ClientError:
            raise
        except Exception as error:
            what = f"what answers at {self._url} is no Triton server; fix: check the address and its protocol"
            raise errors.ServerUnavailableError(what) from error  # --debug shows it

    def _unusable(self, error: Exception) -> errors.ServerUnavailableError:
        return errors.ServerUnavailableError(f"the connection to {self._url} cannot be used ({error})")

    def _failure(self, request: Request, status: str, message: str) -> ClientError:
        """The project's error for a gRPC status by name or an HTTP status by number, and what was said with it."""
        kind = _STATUS_ERRORS.get(status, RejectedError)
        if _QUEUE_FULL in message:
            kind = errors.ServerBusyError
        elif _RESTRICTED in message:
            kind = RejectedError
        elif kind is errors.ServerUnavailableError and any(sign in message.lower() for sign in _TLS_SIGNS):
            kind = InsecureServerError
        elif any(sign in message for sign in _PASSING):
            kind = errors.ServerUnavailableError
        elif "unknown model" in message:
            kind = ModelMissingError
        url, reason = self._url, message.strip().partition("\n")[0] or status or "no reason given"
        if request.request_id and request.request_id not in reason:  # Triton may name it itself
            reason += f"; request {request.request_id}"
        texts = {
            errors.ServerBusyError: f"the queue of the server at {url} is full ({reason}); fix: try later, or send "
            "fewer",
            errors.ServerUnavailableError: f"no Triton server answers at {url} ({reason}); fix: start rekd-serve, or "
            "check the address: HOST:8001 for gRPC, http://HOST:8000 for HTTP, with TLS grpcs:// or https://",
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
    """gRPC for HOST:PORT, grpc:// and grpcs://HOST:PORT, HTTP for http:// and https://HOST:PORT; see ``Transport``.

    Raises:
        ClientError: the address is none, or headers or TLS settings cannot be used.
    """
    from rekd_deploy.client.protocols import GrpcTransport, HttpTransport

    address = Address.parse(url)
    if tls is not None and not address.encrypted:
        raise ClientError(f"'{url}' is not encrypted, but TLS settings are given; give grpcs:// or https://")
    kind = HttpTransport if address.protocol == "http" else GrpcTransport
    return kind(address, timeout, checked_headers(headers), tls or TlsSettings())
