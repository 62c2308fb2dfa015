"""A Triton server on this machine: start it, wait until it is ready, stop it. Loopback only by default.

    with TritonServer("model_repository/python") as server:
        Client(server.grpc_url).predict(["a great film"])
"""

from __future__ import annotations

import http.client
import secrets
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from rekd_deploy.errors import ServerError
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.repository.workspaces import Workspace
from rekd_deploy.server.flags import LOOPBACK, ServerSettings, server_flags
from rekd_deploy.server.live_repository import LiveRepository
from rekd_deploy.server.process import ServerProcess, log_tail, new_memory_prefix, settled_ports, user_folder
from rekd_deploy.server.program import TritonProgram, find_wheel

_SETTLE_SECONDS = 30.0
_NO_GPU = "but no GPUs are available"
"""Triton of models whose configurations name GPUs."""


class TritonServer:
    """A Triton server on one repository, as a context manager.

    Args:
        repository: written by ``write_repository``; checked before the start.
        grpc_port: TCP port; 0: a free one.
        http_port: likewise.
        metrics_port: likewise.
        host: IPv4 address for gRPC and HTTP; the metrics stay on loopback.
        log_file: where its log goes; None: tritonserver-<grpc port>.log in the user's cache folder.
        timeout: seconds it may take to become ready.
        program: what to start; None: the server of the wheel ``nvidia-pytriton``. It is old: anything but loopback is
            for sealed networks.
        exposed: whether an address that other machines reach is meant.
        reload: serve a copy of the repository, in which ``HotReload`` can exchange the version.
        log_verbose: Triton's verbosity.

    Raises:
        ConfigError: an address that other machines reach, and it was not said that this is meant.
    """

    def __init__(
        self,
        repository: str | Path,
        grpc_port: int = 8001,
        http_port: int = 8000,
        metrics_port: int = 8002,
        host: str = LOOPBACK,
        log_file: Path | None = None,
        timeout: float = 120.0,
        *,
        program: TritonProgram | None = None,
        exposed: bool = False,
        reload: bool = False,
        log_verbose: int = 0,
    ) -> None:
        self.repository = Path(repository)
        self.log_file = log_file
        self.ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self.key = secrets.token_hex(16)
        self.live = LiveRepository(self.repository) if reload else None
        self._program = program
        self._settings = ServerSettings(
            repository=str(self.repository.absolute()), host=host, exposed=exposed, reload=reload,
            log_verbose=log_verbose,
        )
        self._timeout = timeout
        self._process: ServerProcess | None = None
        self._space: Workspace | None = None

    @property
    def grpc_url(self) -> str:
        """What ``Client`` takes, HOST:PORT."""
        return f"{self._reachable}:{self.ports['grpc']}"

    @property
    def http_url(self) -> str:
        """What ``Client`` takes, http://HOST:PORT."""
        return f"http://{self._reachable}:{self.ports['http']}"

    @property
    def metrics_url(self) -> str:
        """Prometheus metrics."""
        return f"http://{self._settings.metrics_host}:{self.ports['metrics']}/metrics"

    @property
    def process_id(self) -> int | None:
        """Of the running server."""
        return self._process.process_id if self._process else None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def start(self) -> None:
        """Start and wait until every model is ready. After ``stop`` it starts again, on the same ports.

        Raises:
            RepositoryError: the repository is missing or damaged.
            MissingExtraError: an extra is not installed.
            ServerError: this server cannot run the repository, a port is taken, the server died or was not ready in
                time.
        """
        if self._process is not None:
            raise ServerError("this server is already running; stop it first")
        settings = self._settings
        if self.live is None:
            root, manifest = self.repository, check_repository(self.repository)
        else:
            root, manifest = self.live.prepare()
            settings = replace(settings, repository=str(self.live.models))
        program = self._program or find_wheel()
        program.check_servable(root, manifest)
        hosts = {"grpc": settings.host, "http": settings.host, "metrics": settings.metrics_host}
        self.ports = settled_ports(self.ports, hosts)
        self.log_file = self.log_file or user_folder() / f"tritonserver-{self.ports['grpc']}.log"
        self._space = Workspace("rekd-serve-")  # and away with those of servers that were killed
        try:
            self._launch(program, settings, self._space, self.log_file)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and everything it started; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()
        if self._space is not None:
            self._space.close()
            self._space = None

    def check_running(self) -> None:
        """Raise ServerError with the last lines of the log if the server itself has died."""
        code = self._running.exit_code()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ServerError(f"the Triton server {how}; {self._end_of_log()}")

    def check_alive(self) -> None:
        """The same if the server, or a process of a model, has died."""
        self.check_running()
        if self._running.children_ended():
            raise self._child_died()

    def watch_models(self, change: int, certain: bool = True) -> None:
        """After models were exchanged: take their processes of now as those that ``check_alive`` watches.

        Args:
            change: how many more there are to be than before; waited for, as they end when their last request has.
            certain: whether one has died if there are fewer.
        """
        if self._process is not None:
            self._process.watch_children(change, _SETTLE_SECONDS, certain)

    @property
    def _running(self) -> ServerProcess:
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process

    def _close(self) -> None:
        self.stop()
        if self.live is not None:
            self.live.close()

    def _launch(self, program: TritonProgram, settings: ServerSettings, space: Workspace, log_file: Path) -> None:
        prefix = new_memory_prefix()
        settings = replace(
            settings,
            grpc_port=self.ports["grpc"],
            http_port=self.ports["http"],
            metrics_port=self.ports["metrics"],
            gpu_metrics=program.has_gpu_metrics,
            backends=str(program.place_backends(space.path)),
            caches=None if program.caches is None else str(program.caches),
            python_memory_prefix=prefix,
        )
        command = [str(program.executable), *server_flags(settings, self.key)]
        self._process = ServerProcess(command, program.environment(), space.path, log_file, prefix)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._ready():
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServerError(f"the Triton server was not ready after {self._timeout:.0f} s; {self._end_of_log()}")
            time.sleep(0.1)
        self.check_alive()  # what answered might be another server
        self._running.watch_children()

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(self._reachable, self.ports["http"], timeout=2)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _child_died(self) -> ServerError:
        """Triton would answer errors from now on, and call itself ready."""
        return ServerError(
            "a process that runs one of the models has died (is the memory full?); fix: start the server again, "
            f"or let --restart on-failure do it; {self._end_of_log()}"
        )

    def _end_of_log(self) -> str:
        if self.log_file is None:
            return "it has no log"
        tail = log_tail(self.log_file)
        fix = "it finds no GPU; fix: see nvidia-smi, or rekd-export --cpu; " if _NO_GPU in tail else ""
        return f"{fix}the end of its log {self.log_file}:\n{tail}"

    @property
    def _reachable(self) -> str:
        """The address to connect to: that of all interfaces is none."""
        return LOOPBACK if self._settings.host == "0.0.0.0" else self._settings.host
