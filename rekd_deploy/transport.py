"""Between client and wire: gRPC or HTTP to Triton, in the project's own types and errors. torch-free."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np

from rekd_deploy.errors import (
    ClientError,
    DeadlineError,
    ModelMissingError,
    RejectedError,
    ServerUnavailableError,
)

Arrays = dict[str, np.ndarray]
IN_FLIGHT = 4
"""Requests on their way at once: enough to keep the server's batcher busy while answers are read."""

_TRITON_TYPES = {"int64": "INT64", "float32": "FP32", "bool": "BOOL", "uint8": "UINT8"}
_STATUS_ERRORS = {
    "UNAVAILABLE": ServerUnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "NOT_FOUND": ModelMissingError,
    "404": ModelMissingError,
    "499": DeadlineError,
    "503": ServerUnavailableError,
    "504": DeadlineError,
}


class Transport(ABC):
    """What the client needs of a server."""

    @abstractmethod
    def model_config(self, model: str) -> tuple[dict[str, str], int]:
        """Parameters and max_batch_size of a served model.

        Raises:
            ClientError: of the kind that fits.
        """

    @abstractmethod
    def submit(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> Future[Arrays]:
        """Send a request; the future holds the outputs by name or a ClientError."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the connections."""


def open_transport(url: str, timeout: float) -> Transport:
    """gRPC for HOST:PORT or grpc://HOST:PORT, HTTP for http://HOST:PORT.

    Args:
        timeout: seconds an answer may take.

    Raises:
        ClientError: the address is none.
    """
    match = re.fullmatch(r"(?:(grpc|http)://)?([^\s/:@]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})/?", url)
    if not match or not 0 < int(match[3]) < 65536:
        raise ClientError(f"'{url}' is no address; give HOST:PORT for gRPC (localhost:8001) or http://HOST:PORT")
    address = f"{match[2]}:{match[3]}"
    return HttpTransport(address, timeout) if match[1] == "http" else GrpcTransport(address, timeout)


class GrpcTransport(Transport):
    """tritonclient over gRPC; safe to use from several threads."""

    def __init__(self, address: str, timeout: float) -> None:
        import tritonclient.grpc

        self._library = tritonclient.grpc
        self._url = address
        self._timeout = timeout
        self._client = tritonclient.grpc.InferenceServerClient(address)

    def model_config(self, model: str) -> tuple[dict[str, str], int]:
        try:
            config = self._client.get_model_config(model, client_timeout=self._timeout).config
        except Exception as error:
            raise _typed(error, self._url, model, self._timeout) from None
        return {key: value.string_value for key, value in config.parameters.items()}, config.max_batch_size

    def submit(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> Future[Arrays]:
        future: Future[Arrays] = Future()

        def answered(result: Any, error: Exception | None) -> None:
            try:
                if error is not None:
                    raise error
                future.set_result(_arrays(result, outputs))
            except Exception as reason:
                future.set_exception(_typed(reason, self._url, model, self._timeout))

        try:
            self._client.async_infer(
                model,
                _inputs(self._library, inputs),
                answered,
                outputs=[self._library.InferRequestedOutput(name) for name in outputs],
                client_timeout=self._timeout,
            )
        except Exception as error:
            raise _typed(error, self._url, model, self._timeout) from None
        return future

    def close(self) -> None:
        self._client.close()


class HttpTransport(Transport):
    """tritonclient over HTTP; its client is bound to one thread, so every call opens its own, in a few threads."""

    def __init__(self, address: str, timeout: float) -> None:
        import tritonclient.http

        self._library = tritonclient.http
        self._address = address
        self._url = f"http://{address}"
        self._timeout = timeout
        self._workers = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="rekd-http")

    def model_config(self, model: str) -> tuple[dict[str, str], int]:
        config = self._workers.submit(self._call, model, lambda client: client.get_model_config(model)).result()
        try:
            parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
            return parameters, int(config.get("max_batch_size", 0))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ServerUnavailableError(f"what answers at {self._url} is no Triton server") from None

    def submit(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> Future[Arrays]:
        def ask(client: Any) -> Arrays:
            wanted = [self._library.InferRequestedOutput(name, binary_data=True) for name in outputs]
            return _arrays(client.infer(model, _inputs(self._library, inputs), outputs=wanted), outputs)

        return self._workers.submit(self._call, model, ask)

    def close(self) -> None:
        self._workers.shutdown()

    def _call(self, model: str, ask: Any) -> Any:
        client = self._library.InferenceServerClient(
            self._address, connection_timeout=self._timeout, network_timeout=self._timeout
        )
        try:
            return ask(client)
        except Exception as error:
            raise _typed(error, self._url, model, self._timeout) from None
        finally:
            client.close()


def _inputs(library: ModuleType, arrays: Mapping[str, np.ndarray]) -> list:
    tensors = []
    for name, array in arrays.items():
        tensor = library.InferInput(name, array.shape, _TRITON_TYPES[array.dtype.name])
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        tensors.append(tensor)
    return tensors


def _arrays(result: Any, outputs: Sequence[str]) -> Arrays:
    return {name: result.as_numpy(name) for name in outputs}


def _typed(error: Exception, url: str, model: str, timeout: float) -> ClientError:
    """The project's error for whatever the library raised."""
    from tritonclient.utils import InferenceServerException

    status, message = "", str(error)
    if isinstance(error, InferenceServerException):
        status, message = str(error.status() or "").removeprefix("StatusCode."), str(error.message())
    kind = _STATUS_ERRORS.get(status)
    if isinstance(error, TimeoutError):
        kind = DeadlineError
    elif isinstance(error, OSError) or not isinstance(error, InferenceServerException):
        kind = ServerUnavailableError  # refused, unknown host, or something that does not speak HTTP
    if "unknown model" in message:
        kind = ModelMissingError
    first_line = message.strip().splitlines()[0] if message.strip() else type(error).__name__
    if kind is ServerUnavailableError:
        return kind(f"no Triton server answers at {url} ({first_line}); fix: check the URL, or start rekd-serve")
    if kind is DeadlineError:
        return kind(f"no answer from {url} within {timeout:g} s ({first_line}); fix: a longer timeout")
    if kind is ModelMissingError:
        return kind(f"the server at {url} does not serve the model '{model}' ({first_line})")
    return RejectedError(f"the server at {url} refused the request: {first_line}")
