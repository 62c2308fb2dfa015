"""A Triton server on this machine: start it, wait until it is ready, stop it. Loopback only by default.

    with TritonServer("model_repository/python") as server:
        Client(server.grpc_url).predict(["a great film"])
"""

from __future__ import annotations

import atexit
import ctypes
import http.client
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Self

from rekd_deploy.errors import ServerError
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.repository.workspaces import Workspace
from rekd_deploy.server.beside import Beside, place_beside
from rekd_deploy.server.flags import LOOPBACK, check_host, server_flags, settled_ports
from rekd_deploy.server.live_repository import LiveRepository
from rekd_deploy.server.program import TritonProgram, find_wheel
from rekd_deploy.server.status import user_folder

_STOP_SECONDS = 10.0
_BESIDE = "beside"
_ZOMBIE_SECONDS = 1.0
"""A process that Triton ends itself is waited for sooner."""
_HARMLESS = re.compile(r"CudaDriverHelper|CUDA driver version is insufficient")
"""What the server says as an error on every machine without a GPU."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded before the fork."""


class TritonServer:
    """A Triton server on one repository, as a context manager.

    Args:
        repository: written by ``write_repository``; checked before the start.
        grpc_port, http_port, metrics_port: TCP ports; 0: a free one.
        host: IPv4 address for gRPC and HTTP; the metrics stay on loopback.
        log_file: where its log goes; None: tritonserver-<grpc port>.log in the user's cache folder. What was there is
            kept as ``<name>.1``, and so on up to five.
        timeout: seconds it may take to become ready.
        program: what to start; None: the server of the wheel ``nvidia-pytriton``. It is old: anything but loopback is
            for sealed networks.
        exposed: whether an address that other machines reach is meant.
        reload: serve a copy of the repository, in which ``HotReload`` can exchange the version.
        log_verbose: Triton's verbosity.
        beside: further exports, each under a name of its own; not reloaded.

    Raises:
        ConfigError: other machines reach ``host``, and not ``exposed``.
    """

    def __init__(
        self, repository: str | Path, grpc_port: int = 8001, http_port: int = 8000, metrics_port: int = 8002,
        host: str = LOOPBACK, log_file: Path | None = None, timeout: float = 120.0, *,
        program: TritonProgram | None = None, exposed: bool = False, reload: bool = False, log_verbose: int = 0,
        beside: Sequence[Beside] = (),
    ) -> None:  # fmt: skip
        check_host(host, exposed)
        self.repository = Path(repository)
        self.log_file = log_file
        self.ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self.key = secrets.token_hex(16)
        self.live = LiveRepository(self.repository) if reload else None
        self.beside = tuple(beside)
        self._program = program
        self._host, self._exposed, self._log_verbose, self._timeout = host, exposed, log_verbose, timeout
        self._reachable = LOOPBACK if host == "0.0.0.0" else host
        self._memory_prefix = f"rekd_{os.getpid()}_{secrets.token_hex(4)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._space: Workspace | None = None
        self._aside: Workspace | None = None
        self._zombies: dict[str, float] = {}

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
        return f"http://{LOOPBACK}:{self.ports['metrics']}/metrics"

    @property
    def process_id(self) -> int | None:
        """Of the running server."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._close_aside()
        if self.live is not None:
            self.live.close()

    def _close_aside(self) -> None:
        if self._aside is not None:
            self._aside.close()
            self._aside = None

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
        root, manifest = self.live.prepare() if self.live else (self.repository, check_repository(self.repository))
        program = self._program or find_wheel()
        program.check_servable(root, manifest)
        if self.beside and self._aside is None:
            self._aside = Workspace("rekd-beside-")
            try:
                place_beside(self.beside, self._aside.path / _BESIDE, program.check_servable)
            except BaseException:
                self._close_aside()
                raise
        self.ports = settled_ports(self.ports, self._host)
        self.log_file = self.log_file or user_folder() / f"tritonserver-{self.ports['grpc']}.log"
        self._space = Workspace("rekd-serve-")  # and away with those of servers that were killed
        try:
            self._launch(program, self._space.path, self.log_file)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and everything it started; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            atexit.unregister(self.stop)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # stubs that outlived it
            process.wait()
            for region in Path("/dev/shm").glob(f"{self._memory_prefix}*"):  # of a server that was killed
                region.unlink(missing_ok=True)
        if self._space is not None:
            self._space.close()
            self._space = None

    def check_alive(self) -> None:
        """Raise ServerError with the end of the log if the server, or a process of a model, has died."""
        if self._process is None:
            raise ServerError("the server is not running")
        code = self._process.poll()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ServerError(f"the Triton server {how}; {self._end_of_log()}")
        # Triton waits for the processes that it ends, and never for one that died: it would answer errors from then
        # on, and call itself ready
        now = time.monotonic()
        self._zombies = {child: self._zombies.get(child, now) for child in _zombies_of(self._process.pid)}
        if any(now - since >= _ZOMBIE_SECONDS for since in self._zombies.values()):
            raise ServerError(
                "a process that runs one of the models has died (is the memory full?); fix: start the server again, "
                f"or let --restart on-failure do it; {self._end_of_log()}"
            )

    def _launch(self, program: TritonProgram, folder: Path, log_file: Path) -> None:
        repositories = [str((self.live.models if self.live else self.repository).absolute())]
        repositories += [str(self._aside.path / _BESIDE)] if self._aside else []
        flags = server_flags(
            repositories, self.ports, self.key, host=self._host, exposed=self._exposed,
            reload=self.live is not None, gpu_metrics=program.stub is None, log_verbose=self._log_verbose,
            backends=str(program.place_backends(folder)), memory_prefix=self._memory_prefix,
        )  # fmt: skip
        log_file.parent.mkdir(parents=True, exist_ok=True)
        if log_file.is_file() and not log_file.is_symlink():  # neither /dev/null nor /dev/stdout
            RotatingFileHandler(log_file, backupCount=5, delay=True).doRollover()
        with open(log_file, "ab") as log:
            self._process = subprocess.Popen(
                [str(program.executable), *flags], env=program.environment(folder),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                cwd=folder,  # first on the import path of the python backend, so it must hold no modules
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the whole group
                # the signal follows the starting thread
                preexec_fn=_die_with_parent if threading.current_thread() is threading.main_thread() else None,
            )  # fmt: skip
        atexit.register(self.stop)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._ready():
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServerError(f"the Triton server was not ready after {self._timeout:.0f} s; {self._end_of_log()}")
            time.sleep(0.1)
        self.check_alive()  # what answered might be another server

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(self._reachable, self.ports["http"], timeout=2)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        return False

    def _end_of_log(self) -> str:
        """The last errors of the log, or its last lines if there are none."""
        content = ["(no log)"]
        if self.log_file is not None and self.log_file.is_file():
            content = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in content if line.startswith(("E", "error:")) and not _HARMLESS.search(line)]
        tail = "\n".join(line[:500] for line in (errors or content)[-12:])
        no_gpu = "it finds no GPU; fix: see nvidia-smi, or rekd-export --cpu; "
        return f"{no_gpu if 'but no GPUs are available' in tail else ''}the end of its log {self.log_file}:\n{tail}"


def _zombies_of(process_id: int) -> set[str]:
    """Process ids of the children that have ended, and for which their parent has not waited."""
    found = set()
    for thread in Path(f"/proc/{process_id}/task").glob("*/children"):
        with suppress(OSError):  # a thread or a child has ended meanwhile
            for child in thread.read_text().split():
                stat = Path(f"/proc/{child}/stat").read_text(encoding="utf-8", errors="replace")
                if stat.rpartition(")")[2].split()[0] == "Z":  # after the name, which may hold spaces and brackets
                    found.add(child)
    return found


def _die_with_parent() -> None:
    """Runs in the child: the kernel ends the server if this process is killed outright."""
    parent_death_signal = 1
    _LIBC.prctl(parent_death_signal, signal.SIGTERM)  # type: ignore[union-attr]
