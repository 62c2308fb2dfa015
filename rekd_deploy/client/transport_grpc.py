"""gRPC to Triton, by tritonclient. torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from rekd_deploy.client.connection import Address, TlsSettings, with_protocol
from rekd_deploy.client.transport import (
    Arrays,
    ModelConfig,
    ServerFacts,
    Transport,
    arrays_of,
    triton_inputs,
    typed_error,
)
from rekd_deploy.errors import ClientError, ServerUnavailableError

Found = TypeVar("Found")
_CHANNEL = {
    "grpc.max_send_message_length": -1,  # as long as it takes
    "grpc.max_receive_message_length": -1,
    "grpc.initial_reconnect_backoff_ms": 100,  # a retry must not find the channel still asleep
    "grpc.max_reconnect_backoff_ms": 1000,
    # no pings to learn how much may be on its way to us: responses are small, and each ping costs a request 0.1 ms
    "grpc.http2.bdp_probe": 0,
    "grpc.http2.lookahead_bytes": 1 << 20,
}


class GrpcTransport(Transport):
    """One channel for all threads, kept open; ``tls`` is for an encrypted address."""

    def __init__(self, address: Address, timeout: float, headers: Mapping[str, str], tls: TlsSettings) -> None:
        super().__init__(address, timeout, headers)
        # a failed handshake is an error of ours; gRPC would print a line of its own before it
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        import tritonclient.grpc

        self._library = tritonclient.grpc
        if address.encrypted:
            tls.context()  # its complaints name the mistake; gRPC's do not
        self._client = tritonclient.grpc.InferenceServerClient(
            address.host_and_port,
            ssl=address.encrypted,
            root_certificates=tls.root_certificates,
            private_key=tls.key,
            certificate_chain=tls.certificate,
            channel_args=list(_CHANNEL.items()),
        )

    def model_versions(self, model: str, timeout: float) -> list[str]:
        return list(self._call(self._client.get_model_metadata, model, timeout, model).versions)

    def model_config(self, model: str, version: str, timeout: float) -> ModelConfig:
        config = self._call(self._client.get_model_config, model, timeout, model, version).config
        return ModelConfig(
            {key: value.string_value for key, value in config.parameters.items()}, config.max_batch_size
        )

    def submit(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *,
        timeout: float | None = None, request_id: str = "",
    ) -> Future[Arrays]:
        timeout = self._timeout if timeout is None else timeout
        future: Future[Arrays] = Future()

        def completed(result: Any, error: Exception | None) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if error is not None:
                    raise error
                future.set_result(arrays_of(result, outputs, result.get_response().model_version))
            except Exception as reason:
                future.set_exception(self._typed(reason, model, timeout, request_id))

        try:
            call = self._client.async_infer(
                callback=completed, **self._request(model, inputs, outputs, timeout, request_id)
            )
        except Exception as error:
            raise self._typed(error, model, timeout, request_id) from None
        future.add_done_callback(lambda done: call.cancel() if done.cancelled() else None)
        return future

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *, timeout: float, request_id: str
    ) -> Arrays:
        try:
            result = self._client.infer(**self._request(model, inputs, outputs, timeout, request_id))
            return arrays_of(result, outputs, result.get_response().model_version)
        except Exception as error:
            raise self._typed(error, model, timeout, request_id) from None

    def _request(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], timeout: float, request_id: str
    ) -> dict[str, Any]:
        """What ``submit`` and ``infer`` hand to the library."""
        return {
            "model_name": model,
            "inputs": triton_inputs(self._library.InferInput, inputs),
            "outputs": [self._library.InferRequestedOutput(name) for name in outputs],
            "request_id": request_id,
            "client_timeout": timeout,
            "headers": self._headers,
        }

    def server_facts(self, model: str, timeout: float) -> ServerFacts:
        call, client = self._call, self._client
        triton = call(client.get_server_metadata, model, timeout, as_json=True)["version"]
        ready = call(client.is_server_ready, model, timeout) and call(client.is_model_ready, model, timeout, model)
        statistics = call(client.get_inference_statistics, model, timeout, as_json=True)["model_stats"]
        return ServerFacts(triton, ready, statistics)

    def explained(self, error: ClientError) -> ClientError:
        return with_protocol(error, self._address)

    def close(self) -> None:
        self._client.close()

    def _call(
        self, function: Callable[..., Found], model: str, timeout: float, *arguments: Any, **options: Any
    ) -> Found:
        try:
            return function(*arguments, **options, client_timeout=timeout, headers=self._headers)
        except Exception as error:
            raise self._typed(error, model, timeout) from None

    def _typed(self, error: Exception, model: str, timeout: float, request_id: str = "") -> ClientError:
        from tritonclient.utils import InferenceServerException

        if not isinstance(error, InferenceServerException):  # a closed channel, or a response that is none of Triton's
            return ServerUnavailableError(f"the connection to {self._url} cannot be used ({error})")
        status = str(error.status() or "").removeprefix("StatusCode.")
        return typed_error(status, str(error.message()), self._url, model, timeout=timeout, request_id=request_id)
