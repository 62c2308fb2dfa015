"""rekd-serve as a process of its own, as a user starts it: its addresses, its lines, its memory, its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import urllib3

from rekd_train.errors import RekdError

_START_SECONDS, _STOP_SECONDS = 180.0, 30.0
_OPTIONS = {"grpc": "grpc-port", "http": "http-port", "front": "http"}
_ADDRESSES = {"grpc": r"^gRPC +(\S+)", "http": r"^HTTP +(\S+)", "front": r"^page +(\S+)/$"}


class ServedError(RekdError):
    """The server did not come up, or went away."""


class Served:
    """A running rekd-serve; as a context manager it is started and ended.

    Args:
        repository: what it serves.
        folder: for its output, its log and its temporary files.
        options: further arguments; ports that they do not name are free ones.
        temporary: its ``TMPDIR``; None: ``folder``.
        output: where what it says goes; None: into ``folder``.
    """

    def __init__(
        self, repository: Path, folder: Path, *options: str, temporary: Path | None = None, output: Path | None = None
    ) -> None:
        self._output, self._temporary = output or folder / "output", temporary or folder
        ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
        self._command = [sys.executable, "-m", "rekd_deploy.cli.serve", str(repository), *ports,
                         "--log", str(folder / "triton.log"), *options]  # fmt: skip
        self.addresses: dict[str, str] = {}
        """Of 'grpc', 'http' and 'front'."""
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.end(signal.SIGTERM)

    def start(self) -> None:
        """Start it, on the ports that it had before if it had some, and wait until it answers; ServedError: it does
        not."""
        ports = [f"--{_OPTIONS[name]}={url.rpartition(':')[2]}" for name, url in self.addresses.items()]
        begin = self._output.stat().st_size if self._output.exists() else 0
        with open(self._output, "a") as output:
            environment = os.environ | {"TMPDIR": str(self._temporary)}
            self._process = subprocess.Popen(
                [*self._command, *ports], stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        until = time.monotonic() + _START_SECONDS
        while "Ctrl-C" not in (said := self._output.read_text()[begin:]):
            if self._process.poll() is not None or time.monotonic() > until:
                raise ServedError(f"rekd-serve did not start: {said.strip()[-500:]}")
            time.sleep(0.1)
        found = {name: re.search(pattern, said, re.MULTILINE) for name, pattern in _ADDRESSES.items()}
        self.addresses = {name: match[1] for name, match in found.items() if match}

    def signal(self, number: int) -> None:
        """Send a signal to rekd-serve alone."""
        if self._process is not None:
            self._process.send_signal(number)

    def end(self, number: int) -> None:
        """Send it a signal, and wait for its end and that of its Triton."""
        family = [*self.family()]
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self.signal(number)
            self._process.wait(_STOP_SECONDS)
        for each in family:  # who was killed leaves its children behind
            stop(each, signal.SIGCONT, signal.SIGKILL)

    def wait_until_ready(self, until: float) -> None:
        """Until it answers for its model, or ``time.monotonic`` is ``until``."""
        probe = f"{self.addresses['http']}/v2/models/rekd/ready"
        while time.monotonic() < until:
            with suppress(urllib3.exceptions.HTTPError):
                if urllib3.request("GET", probe, retries=False, timeout=1.0).status == 200:
                    return
            time.sleep(0.2)

    @property
    def lines(self) -> list[str]:
        """What it has said so far."""
        return self._output.read_text().splitlines()

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def family(self) -> Sequence[int]:
        """Ids of the processes below it: Triton, and the processes of its python backend."""
        return [] if self._process is None else descendants(self._process.pid)

    def memory(self) -> dict[str, float]:
        """MB that are resident: in rekd-serve, which holds the front, and in Triton's processes together."""
        if self._process is None:
            return {}
        return {"front": resident(self._process.pid), "triton": round(sum(map(resident, self.family())), 1)}


def stop(process: int, *signals: int) -> None:
    """Send signals to a process that may be gone."""
    for number in signals:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            return


def descendants(process: int) -> list[int]:
    """Ids of a process's children, and of theirs; parents first."""
    try:
        children = [int(child) for task in Path(f"/proc/{process}/task").iterdir()
                    for child in (task / "children").read_text().split()]  # fmt: skip
    except OSError:
        return []
    return children + [each for child in children for each in descendants(child)]


def resident(process: int | str = "self") -> float:
    """MB of a process that are resident; 0: it is gone."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
