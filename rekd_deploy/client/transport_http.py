"""HTTP to Triton: tritonclient makes and reads the bodies, urllib3 keeps the connections. torch-free.

tritonclient's own HTTP client belongs to one thread; urllib3's pool is safe to use from several.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

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
from rekd_deploy.errors import ClientError, ModelMissingError, RejectedError, ServerUnavailableError

CONNECTIONS = 32
"""Most requests of one client on their way at once; the others wait their turn. Each open connection has a thread."""
_JSON_LENGTH = "Inference-Header-Content-Length"
_CHUNK = 1 << 20


class HttpTransport(Transport):
    """Connections are kept open and shared by all threads; ``tls`` is for an encrypted address."""

    def __init__(self, address: Address, timeout: float, headers: Mapping[str, str], tls: TlsSettings) -> None:
        super().__init__(address, timeout, headers)
        from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

        endpoint = (address.host, address.port)
        self._pool = (
            HTTPSConnectionPool(*endpoint, maxsize=CONNECTIONS, ssl_context=tls.context())
            if address.encrypted
            else HTTPConnectionPool(*endpoint, maxsize=CONNECTIONS)
        )
        self._workers = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="rekd-http")

    def model_versions(self, model: str, timeout: float) -> list[str]:
        found = self._get(f"v2/models/{quote(model, safe='')}", model, timeout)
        try:
            return [str(version) for version in found["versions"]]
        except (KeyError, TypeError):
            raise self._no_triton() from None

    def model_config(self, model: str, version: str, timeout: float) -> ModelConfig:
        config = self._get(f"v2/models/{quote(model, safe='')}/versions/{version}/config", model, timeout)
        try:
            parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
            return ModelConfig(parameters, int(config.get("max_batch_size", 0)))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._no_triton() from None

    def submit(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str], *,
        timeout: float | None = None, request_id: str = "",
    ) -> Future[Arrays]:
        from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

        timeout = self._timeout if timeout is None else timeout
        until = time.monotonic() + timeout
        body, json_length = InferenceServerClient.generate_request_body(
            triton_inputs(InferInput, inputs),
            outputs=[InferRequestedOutput(name, binary_data=True) for name in outputs],
            request_id=request_id,
        )
        length = {} if json_length is None else {_JSON_LENGTH: str(json_length)}

        def infer() -> Arrays:
            path = f"v2/models/{quote(model, safe='')}/infer"
            headers, content = self._exchange("POST", path, model, timeout, until, body, length, request_id)
            try:
                found = headers.get(_JSON_LENGTH)
                result = InferenceServerClient.parse_response_body(
                    content, header_length=None if found is None else int(found)
                )
                return arrays_of(result, outputs, str(result.get_response().get("model_version", "")))
            except Exception:  # whatever the library makes of a response that is none
                raise self._no_triton() from None

        try:
            return self._workers.submit(infer)
        except RuntimeError as error:  # closed meanwhile
            raise ServerUnavailableError(f"the connection to {self._url} cannot be used ({error})") from None

    def server_facts(self, model: str, timeout: float) -> ServerFacts:
        triton, statistics = (self._get(path, model, timeout) for path in ("v2", "v2/models/stats"))
        try:
            facts = ServerFacts(triton["version"], False, statistics["model_stats"])
        except (KeyError, TypeError):
            raise self._no_triton() from None
        paths = ("v2/health/ready", f"v2/models/{quote(model, safe='')}/ready")
        return facts._replace(ready=all(self._says_yes(path, model, timeout) for path in paths))

    def explained(self, error: ClientError) -> ClientError:
        return with_protocol(error, self._address)

    def close(self) -> None:
        self._workers.shutdown(cancel_futures=True)
        self._pool.close()

    def _get(self, path: str, model: str, timeout: float) -> Any:
        _, content = self._exchange("GET", path, model, timeout, time.monotonic() + timeout)
        try:
            return json.loads(content)
        except ValueError:
            raise self._no_triton() from None

    def _says_yes(self, path: str, model: str, timeout: float) -> bool:
        try:
            self._exchange("GET", path, model, timeout, time.monotonic() + timeout)
        except (RejectedError, ModelMissingError):  # 400: no
            return False
        return True

    def _exchange(
        self, method: str, path: str, model: str, timeout: float, until: float,
        body: bytes = b"", headers: Mapping[str, str] | None = None, request_id: str = "",
    ) -> tuple[Mapping[str, str], bytes]:
        """The headers and the whole content of a response, or the error that fits."""
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError, NewConnectionError, SSLError, TimeoutError

        def failure(status: str, message: str) -> ClientError:
            return typed_error(status, message, self._url, model, timeout=timeout, request_id=request_id)

        remaining = until - time.monotonic()
        if remaining <= 0:
            raise failure("504", "it waited too long for a free connection")
        try:
            response = self._pool.urlopen(
                method,
                f"/{path}",
                body=body or None,
                headers={**self._headers, **(headers or {})},
                timeout=Timeout(total=remaining),
                retries=False,
                redirect=False,
                preload_content=False,
            )
            chunks = []
            while chunk := response.read1(_CHUNK):
                chunks.append(chunk)
                if time.monotonic() > until:
                    response.close()
                    raise failure("504", "the response came too slowly")
            content = b"".join(chunks)
        except SSLError as error:
            raise failure("503", f"TLS handshake failed: {error}") from None
        except NewConnectionError as error:  # urllib3 counts a refusal among the time-outs
            raise failure("503", str(error)) from None
        except TimeoutError as error:
            raise failure("504", str(error)) from None
        except (HTTPError, OSError) as error:  # refused, unknown host, cut off, or something that does not speak HTTP
            raise failure("503", str(error)) from None
        if response.status != 200:
            raise failure(str(response.status), _reason(content, response.reason))
        return response.headers, content

    def _no_triton(self) -> ServerUnavailableError:
        return ServerUnavailableError(f"what answers at {self._url} is no Triton server; fix: check the URL")


def _reason(content: bytes, reason: str | None) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content.decode("utf-8", "replace").strip() or str(reason)
