"""A Triton process on this machine: start it, wait until it is ready, stop it. Loopback only by default.

    with TritonServer("model_repository/python") as server:
        Client(server.grpc_url).predict(["a great film"])
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import http.client
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rekd_deploy.errors import ServerError
from rekd_deploy.processes import children_of, has_ended
from rekd_deploy.repository_check import check_repository
from rekd_deploy.triton_wheel import TritonWheel, check_servable, find_wheel
from rekd_deploy.workspaces import Workspace

PORT_FLAGS = {"grpc": "--grpc-port", "http": "--http-port", "metrics": "--metrics-port"}
_LOG_LINES = 12
_LINE_WIDTH = 500
_HARMLESS = re.compile(r"CudaDriverHelper|CUDA driver version is insufficient")
"""What the server says as an error on every machine without a GPU."""
_STOP_SECONDS = 10.0
_ADMIN_APIS = ("model-repository", "shared-memory", "trace", "logging")
"""Interfaces that no client needs; a request must carry a key that only this process knew."""


class TritonServer:
    """The server of the wheel ``nvidia-pytriton`` on one repository, as a context manager.

    Args:
        repository: written by ``write_repository``; checked before the start.
        grpc_port: TCP port; 0: a free one.
        http_port: likewise.
        metrics_port: likewise.
        host: address to listen on. This server is old: anything but loopback is for sealed networks.
        log_file: where its log goes; None: tritonserver-<grpc port>.log in the user's cache folder.
        timeout: seconds it may take to become ready.
    """

    def __init__(
        self,
        repository: str | Path,
        grpc_port: int = 8001,
        http_port: int = 8000,
        metrics_port: int = 8002,
        host: str = "127.0.0.1",
        log_file: Path | None = None,
        timeout: float = 120.0,
    ) -> None:
        self.repository = Path(repository)
        self.host = host
        self.ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self.log_file = log_file
        self._timeout = timeout
        self._process: subprocess.Popen | None = None
        self._space: Workspace | None = None
        self._work: Path | None = None
        self._stubs: set[int] = set()
        self._shared_memory = f"rekd_{os.getpid()}_{secrets.token_hex(4)}"

    @property
    def grpc_url(self) -> str:
        """What ``Client`` takes, HOST:PORT."""
        return f"{self.host}:{self.ports['grpc']}"

    @property
    def http_url(self) -> str:
        """What ``Client`` takes, http://HOST:PORT."""
        return f"http://{self.host}:{self.ports['http']}"

    @property
    def metrics_url(self) -> str:
        """Prometheus metrics."""
        return f"http://{self.host}:{self.ports['metrics']}/metrics"

    @property
    def process_id(self) -> int | None:
        """Of the running server."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until every model is ready.

        Raises:
            RepositoryError: the repository is missing or damaged.
            MissingExtraError: an extra is not installed.
            ServerError: this server cannot run the repository, a port is taken, the server died or was not ready in
                time.
        """
        if self._process is not None:
            raise ServerError("this server is already running; stop it first")
        check_servable(self.repository, check_repository(self.repository))
        wheel = find_wheel()
        self.ports = settled_ports(self.ports, self.host)
        self.log_file = self.log_file or _default_log(self.ports["grpc"])
        self._space = Workspace("rekd-serve-")  # and away with those of servers that were killed
        self._work = self._space.path
        try:
            self._launch(wheel)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and everything it started; safe to call twice."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # stubs that outlived it
            process.wait()
            for region in Path("/dev/shm").glob(f"{self._shared_memory}*"):
                region.unlink(missing_ok=True)
        if self._space is not None:
            self._space.close()
            self._space = self._work = None

    def check_alive(self) -> None:
        """Raise ServerError with the last lines of the log if the server, or a process of a model, has died."""
        if self._process is None:
            raise ServerError("the server is not running")
        code = self._process.poll()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ServerError(f"the Triton server {how}; the end of its log {self.log_file}:\n{self.log_tail()}")
        if any(map(has_ended, self._stubs)):  # Triton would answer errors from now on, and call itself ready
            raise ServerError(
                "a process that runs one of the models has died (is the memory full?); fix: start the server again; "
                f"the end of its log {self.log_file}:\n{self.log_tail()}"
            )

    def log_tail(self, lines: int = _LOG_LINES) -> str:
        """The last errors of the log, or its last lines if there are none."""
        try:
            content = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "(no log)"
        errors = [line for line in content if line.startswith(("E", "error:")) and not _HARMLESS.search(line)]
        return "\n".join(line[:_LINE_WIDTH] for line in (errors or content)[-lines:])

    def _launch(self, wheel: TritonWheel) -> None:
        command = [str(wheel.executable), *self._flags(wheel)]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_file, "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=wheel.environment(),
                cwd=self._work,  # first on the stub's import path, so it must hold no modules
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the whole group
                preexec_fn=_die_with_parent if threading.current_thread() is threading.main_thread() else None,
            )
        atexit.register(self.stop)

    def _flags(self, wheel: TritonWheel) -> list[str]:
        key = f"rekd-admin={secrets.token_hex(16)}"
        flags = {
            "model-repository": self.repository.absolute(),
            "backend-directory": wheel.place_backends(self._work),
            "cache-directory": wheel.caches,
            "model-control-mode": "none",
            "strict-readiness": "true",
            "exit-on-error": "true",
            "exit-timeout-secs": "5",
            "allow-gpu-metrics": "false",
            "backend-config": f"python,shm-region-prefix-name={self._shared_memory}",
            "http-restricted-api": f"{','.join(_ADMIN_APIS)}:{key}",
            "grpc-restricted-protocol": f"{','.join(_ADMIN_APIS)}:{key}",
        }
        for interface, port in self.ports.items():
            flags[f"{interface}-address"] = self.host
            flags[f"{interface}-port"] = port
        return ["--disable-auto-complete-config", *(f"--{name}={value}" for name, value in flags.items())]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._ready():
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the Triton server was not ready after {self._timeout:.0f} s; the end of its log "
                    f"{self.log_file}:\n{self.log_tail()}"
                )
            time.sleep(0.1)
        self.check_alive()  # what answered might be another server
        self._stubs = children_of(self._process.pid)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.ports["http"], timeout=2)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def settled_ports(wanted: dict[str, int], host: str) -> dict[str, int]:
    """The ports to use: free ones for 0, the others checked.

    Raises:
        ServerError: names every port that is taken and the flag that changes it.
    """
    mistakes, ports, held = [], {}, []
    for interface, port in wanted.items():
        flag = PORT_FLAGS[interface]
        if not 0 <= port <= 65535:
            mistakes.append(f"port {port} is outside 0..65535; change {flag}")
            continue
        if port and port in ports.values():
            mistakes.append(f"port {port} is given twice; change {flag}")
            continue
        listener = socket.socket()
        held.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton: an old connection may linger
        try:
            listener.bind((host, port))
            listener.listen(1)
        except OSError as error:
            mistakes.append(f"port {port} cannot be used ({error.strerror}); choose another with {flag} (0: any free)")
            continue
        ports[interface] = listener.getsockname()[1]
    for listener in held:
        listener.close()
    if mistakes:
        raise ServerError("; ".join(mistakes))
    return ports


def _default_log(port: int) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "rekd" / f"tritonserver-{port}.log"


def _die_with_parent() -> None:
    """Runs in the child: the kernel ends the server if this process is killed outright.

    The signal follows the starting *thread*, so it is only asked for in the main thread.
    """
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


if sys.platform == "linux":
    ctypes.CDLL(None)  # loaded before the fork
