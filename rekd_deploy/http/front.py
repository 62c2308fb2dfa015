"""The application under uvicorn: in a thread beside Triton, or alone."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from rekd_deploy.errors import ServerError
from rekd_deploy.http.limits import Limits, api_key
from rekd_deploy.server.flags import LOOPBACK, check_host
from rekd_train.errors import MissingExtraError

if TYPE_CHECKING:
    import uvicorn

_MODULES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "fastapi_offline")
_STOP_SECONDS = 5
_BACKLOG = 2048
_TALKATIVE = ("uvicorn.error", "python_multipart")
"""They warn of every malformed request, so a client could fill the log."""


class Front:
    """The HTTP front, as a context manager: it holds its port from ``__enter__`` on, and answers from ``start`` on.

    Args:
        port: TCP port; 0: a free one.
        host: IPv4 address.
        exposed: whether an address that other machines reach is meant; with a key it may be.
        limits: of requests.
        environment: where ``REKD_API_KEY`` is.

    Raises:
        MissingExtraError: the extra ``http`` is not installed.
        ConfigError: other machines reach ``host``, and there is neither a key nor ``exposed``; the key is too short.
    """

    def __init__(
        self, port: int, host: str = LOOPBACK, *, exposed: bool, limits: Limits, environment: Mapping[str, str]
    ) -> None:
        for module in _MODULES:
            if find_spec(module) is None:
                raise MissingExtraError(module, "http")
        check_host(host, exposed or api_key(environment) is not None)
        self._host, self._port, self._limits, self._environment = host, port, limits, environment
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """http://HOST:PORT."""
        return f"http://{LOOPBACK if self._host == '0.0.0.0' else self._host}:{self._port}"

    def __enter__(self) -> Self:
        """ServerError: the port is taken."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self._host, self._port))
            self._socket.listen(_BACKLOG)  # clients that come before Triton is ready wait
        except OSError as error:
            self._socket.close()
            raise ServerError(
                f"port {self._port} cannot be used ({error.strerror}); choose another with --http (0: any free)"
            ) from None
        self._port = self._socket.getsockname()[1]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(_STOP_SECONDS + 1)
        if self._socket is not None:
            self._socket.close()

    def start(self, triton: str, beside: Sequence[str] = ()) -> None:
        """Answer, in a thread, with what the Triton server at that address says; ``beside``: its further models."""
        import uvicorn

        from rekd_deploy.http.app import create_app
        from rekd_deploy.http.protocol import Protocol

        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        app = create_app(triton, self._limits, environment=self._environment, beside=beside)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=30,
            timeout_graceful_shutdown=_STOP_SECONDS, lifespan="on", ws="none",
            http=partial(Protocol, head_seconds=self._limits.seconds),
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="rekd-http", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until an exception such as KeyboardInterrupt comes; ServerError: it ended by itself."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.5)  # with an end, so that signals are seen
        raise ServerError("the HTTP front has ended; its last lines say why")
