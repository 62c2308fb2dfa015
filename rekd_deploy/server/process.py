"""One process of a Triton server with all it starts: its ports, its children, its end, and the log it leaves."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path

from rekd_deploy.errors import ServerError
from rekd_deploy.server.flags import PORT_FLAGS

_LOG_LINES = 12
_LINE_WIDTH = 500
_EARLIER_LOGS = 5
_HARMLESS = re.compile(r"CudaDriverHelper|CUDA driver version is insufficient")
"""What the server says as an error on every machine without a GPU."""
_STOP_SECONDS = 10.0
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded before the fork."""


class ServerProcess:
    """A running server; ``stop`` it.

    Args:
        command: the executable and its arguments.
        environment: its environment variables.
        folder: its working directory; first on the import path of the python backend, so it must hold no modules.
        log_file: where its output goes; what was there is kept as ``<name>.1``, and so on up to five.
        memory_prefix: how the names of its shared memory begin, which a killed server leaves behind.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        log_file: Path,
        memory_prefix: str,
    ) -> None:
        self._memory_prefix = memory_prefix
        self._watched: set[int] = set()
        self._missing = False
        log_file.parent.mkdir(parents=True, exist_ok=True)
        _keep_earlier_logs(log_file)
        with open(log_file, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the whole group
                preexec_fn=_die_with_parent if threading.current_thread() is threading.main_thread() else None,
            )
        atexit.register(self.stop)

    @property
    def process_id(self) -> int:
        """Of the server itself."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """As of ``subprocess.Popen.poll``; None: it runs."""
        return self._process.poll()

    def watch_children(self, change: int = 0, patience: float = 0.0, certain: bool = True) -> None:
        """Take the processes that run models now as those that should go on.

        Args:
            change: how many more there are to be than were watched until now.
            patience: seconds to wait for that number; then, whatever there is.
            certain: whether fewer than that number means that one has ended.
        """
        wanted, deadline = len(self._watched) + change, time.monotonic() + patience
        while len(found := self._children()) != wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        self._watched, self._missing = found, self._missing or (certain and len(found) < wanted)

    def _children(self) -> set[int]:
        return {child for child in children_of(self._process.pid) if not has_ended(child)}

    def children_ended(self) -> bool:
        """Whether one of those has ended, or was missing among them."""
        return self._missing or any(map(has_ended, self._watched))

    def stop(self) -> None:
        """End the server and everything it started; safe to call twice."""
        atexit.unregister(self.stop)
        process = self._process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # stubs that outlived it
        process.wait()
        for region in Path("/dev/shm").glob(f"{self._memory_prefix}*"):
            region.unlink(missing_ok=True)


def user_folder() -> Path:
    """Where logs and states of this user's servers lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rekd"


def new_memory_prefix() -> str:
    """A name for the shared memory of one server, unlike any other's."""
    return f"rekd_{os.getpid()}_{secrets.token_hex(4)}"


def log_tail(log_file: Path, lines: int = _LOG_LINES) -> str:
    """The last errors of a server's log, or its last lines if there are none."""
    try:
        content = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(no log)"
    errors = [line for line in content if line.startswith(("E", "error:")) and not _HARMLESS.search(line)]
    return "\n".join(line[:_LINE_WIDTH] for line in (errors or content)[-lines:])


def _keep_earlier_logs(log_file: Path) -> None:
    """Make room: the log of a server that died tells why."""
    if log_file.is_file() and not log_file.is_symlink():  # neither /dev/null nor /dev/stdout
        RotatingFileHandler(log_file, backupCount=_EARLIER_LOGS, delay=True).doRollover()


def _die_with_parent() -> None:
    """Runs in the child: the kernel ends the server if this process is killed outright.

    The signal follows the starting *thread*, so it is only set in the main thread.
    """
    parent_death_signal = 1
    _LIBC.prctl(parent_death_signal, signal.SIGTERM)


def children_of(process_id: int) -> set[int]:
    """Process ids of the running children."""
    everyone = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return {each for each in everyone if (known := _state_and_parent(each)) and known[1] == process_id}


def has_ended(process_id: int) -> bool:
    """Whether a process is gone, or dead and not yet waited for."""
    state = _state_and_parent(process_id)
    return state is None or state[0] in "ZX"


def _state_and_parent(process_id: int) -> tuple[str, int] | None:
    try:
        facts = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, parent = facts.rpartition(")")[2].split()[:2]  # the name before it may hold spaces and brackets
    return state, int(parent)


def settled_ports(wanted: Mapping[str, int], hosts: Mapping[str, str]) -> dict[str, int]:
    """The ports to use: free ones for 0, the others checked.

    Args:
        wanted: by interface: 'grpc', 'http', 'metrics'.
        hosts: the address of each.

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
            listener.bind((hosts[interface], port))
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
