"""gRPC and HTTP to Triton. torch-free.

tritonclient makes and reads gRPC's messages. Its own HTTP client belongs to one thread and takes many packages; here
urllib3's pool, which is safe to use from several, keeps the connections.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import numpy as np

from rekd_deploy.client.connection import Address, TlsSettings
from rekd_deploy.client.http_messages import JSON_LENGTH, request_body, response_arrays
from rekd_deploy.client.transport import WORKERS, Arrays, Request, Transport
from rekd_deploy.errors import ModelMissingError, RejectedError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

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

    ends_in_time = True

    def __init__(self, address: Address, timeout: float, headers: Mapping[str, str], tls: TlsSettings) -> None:
        super().__init__(address, timeout, headers)
        # a failed handshake is an error of ours; gRPC would print a line of its own before it
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import tritonclient.grpc

        if address.encrypted:
            tls.context()  # its complaints name the mistake; gRPC's do not
        self._client = tritonclient.grpc.InferenceServerClient(
            address.host_and_port, ssl=address.encrypted, root_certificates=tls.root_certificates,
            private_key=tls.key, certificate_chain=tls.certificate, channel_args=list(_CHANNEL.items()),
        )  # fmt: skip

    def infer(self, request: Request) -> Arrays:
        from tritonclient.grpc import InferInput, InferRequestedOutput
        from tritonclient.utils import np_to_triton_dtype

        inputs = []
        for name, array in request.inputs.items():
            inputs.append(InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(array))
        outputs = [InferRequestedOutput(name) for name in request.outputs]
        result = self._call(
            self._client.infer, request, request.model, inputs, request.version, outputs=outputs,
            request_id=request.request_id,
        )
        arrays = Arrays({name: result.as_numpy(name) for name in request.outputs})
        arrays.version = result.get_response().model_version
        return arrays

    def _told(self, what: str, request: Request, version: str = "") -> dict[str, Any]:
        client = self._client
        function, *arguments = {
            "server": (client.get_server_metadata,),
            "statistics": (client.get_inference_statistics,),
            "model": (client.get_model_metadata, request.model),
            "config": (client.get_model_config, request.model, version),
        }[what]
        told = self._call(function, request, *arguments, as_json=True)
        return told["config"] if what == "config" else told

    def _is_ready(self, request: Request) -> bool:
        client = self._client
        return self._call(client.is_server_ready, request) and self._call(client.is_model_ready, request, request.model)

    def close(self) -> None:
        self._client.close()
        super().close()

    def _call(self, function: Callable[..., Found], request: Request, *arguments: Any, **options: Any) -> Found:
        from tritonclient.utils import InferenceServerException

        try:
            return function(*arguments, **options, client_timeout=request.remaining, headers=self._headers)
        except InferenceServerException as error:
            status = str(error.status() or "").removeprefix("StatusCode.")
            raise self._failure(request, status, str(error.message())) from None
        except Exception as error:  # a closed channel, or a response that is none of Triton's
            raise self._unusable(error) from None


class HttpTransport(Transport):
    """Connections are kept open and shared by all threads; ``tls`` is for an encrypted address."""

    def __init__(self, address: Address, timeout: float, headers: Mapping[str, str], tls: TlsSettings) -> None:
        super().__init__(address, timeout, headers)
        from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

        kind = HTTPSConnectionPool if address.encrypted else HTTPConnectionPool
        options = {"ssl_context": tls.context()} if address.encrypted else {}
        self._pool = kind(address.host, address.port, maxsize=WORKERS, **options)

    def infer(self, request: Request) -> Arrays:
        body, json_length = request_body(request)
        length = {JSON_LENGTH: str(json_length)}
        response = self._exchange("POST", f"{_path(request.model, request.version)}/infer", request, body, length)
        with self._reading():
            return response_arrays(response.data, response.headers.get(JSON_LENGTH), request)

    def _told(self, what: str, request: Request, version: str = "") -> dict[str, Any]:
        model = _path(request.model)
        paths = {"server": "v2", "statistics": "v2/models/stats", "model": model}
        return self._exchange("GET", paths.get(what, f"{_path(request.model, version)}/config"), request).json()

    def _is_ready(self, request: Request) -> bool:
        try:
            for path in ("v2/health/ready", f"{_path(request.model)}/ready"):
                self._exchange("GET", path, request)
        except (RejectedError, ModelMissingError):  # 400: no
            return False
        return True

    def close(self) -> None:
        self._pool.close()
        super().close()

    def _exchange(
        self, method: str, path: str, request: Request, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> BaseHTTPResponse:
        """The whole response, or the error that fits."""
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError, NewConnectionError, SSLError, TimeoutError

        if request.remaining <= 0:
            raise self._failure(request, "504", "it waited too long for a free connection")
        try:
            response = self._pool.urlopen(
                method, f"/{path}", body=body or None, headers={**self._headers, **(headers or {})},
                timeout=Timeout(total=request.remaining), retries=False, redirect=False,
            )  # fmt: skip
        except (HTTPError, OSError) as error:  # refused, unknown host, cut off, or something that does not speak HTTP
            late = isinstance(error, TimeoutError) and not isinstance(error, NewConnectionError)  # its subclass
            what = "TLS handshake failed: " if isinstance(error, SSLError) else ""
            raise self._failure(request, "504" if late else "503", f"{what}{error}") from None
        if response.status == 200:
            return response
        try:
            reason = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            reason = response.data.decode("utf-8", "replace").strip() or str(response.reason)
        raise self._failure(request, str(response.status), reason)


def _path(model: str, version: str = "") -> str:
    model = f"v2/models/{quote(model, safe='')}"
    return f"{model}/versions/{version}" if version else model
