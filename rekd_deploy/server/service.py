"""A server that is looked after: watched, started again when it dies, given new versions; until it is stopped."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rekd_deploy.errors import ServerError
from rekd_deploy.repository.manifest import Versions
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.server.hot_reload import HotReload
from rekd_deploy.server.process import has_ended, user_folder
from rekd_deploy.server.server import TritonServer
from rekd_train.errors import ConfigError

_LOOK_SECONDS = 0.2
_PREFIX = "serving-"


@dataclass(frozen=True)
class RestartPolicy:
    """How often, and after which pauses."""

    limit: int = 5
    """Starts in a row; 0: none, a death ends the service."""
    first_pause: float = 1.0
    """Seconds before the first of them; each further pause is twice as long."""
    longest_pause: float = 30.0
    healthy_seconds: float = 60.0
    """A server that has run this long has recovered: the counting begins anew."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"the limit of restarts is {self.limit}; it must be at least 0")

    def pause(self, deaths: int) -> float | None:
        """Seconds to wait before the next start; None: no more.

        Args:
            deaths: in a row, this one included.
        """
        if deaths > self.limit:
            return None
        return min(self.first_pause * 2.0 ** (deaths - 1), self.longest_pause)


NEVER = RestartPolicy(limit=0)


class Service:
    """Runs a server.

    Args:
        server: not started yet.
        restart: what follows when it dies.
        reload: gives it new versions; None: it serves what was there at the start.
        report: called with a line for each thing that happens.
    """

    def __init__(
        self,
        server: TritonServer,
        restart: RestartPolicy = NEVER,
        reload: HotReload | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._server = server
        self._restart = restart
        self._reload = reload
        self._report = report
        self._restarts = 0

    def run(self, ready: Callable[[], None] = lambda: None, stopped: threading.Event | None = None) -> None:
        """Serve until ``stopped`` is set, or an exception such as KeyboardInterrupt comes.

        Args:
            ready: called once, when the server answers for the first time.
            stopped: ends it; None: nothing does but an exception.

        Raises:
            RepositoryError, MissingExtraError, ServerError: it could not be started, or died and is not (or no more)
                started again.
        """
        stopped = stopped or threading.Event()
        deaths = 0
        with self._server:
            try:
                self._write_down()
                ready()
                answers_since: float | None = time.monotonic()
                while not stopped.is_set():
                    try:
                        if answers_since is None:
                            self._start_again()
                            answers_since = time.monotonic()
                        self._watch(stopped)
                    except ServerError as error:
                        deaths = 1 if self._has_recovered(answers_since) else deaths + 1
                        answers_since = None
                        pause = self._restart.pause(deaths)
                        if pause is None:
                            raise self._last_word(error, deaths) from None
                        self._report(
                            f"{error}\nstarting again in {pause:g} s ({deaths} of {self._restart.limit}); the log so "
                            f"far is kept as {self._server.log_file}.1"
                        )
                        self._server.stop()  # what is left of it
                        stopped.wait(pause)
            finally:
                remove_state(os.getpid())

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(_LOOK_SECONDS):
            self._server.check_alive()
            if self._reload is not None:
                before = self._version
                self._reload.poll()
                if self._version != before:
                    self._write_down()

    def _start_again(self) -> None:
        self._server.start()
        self._restarts += 1
        if self._reload is not None:
            self._reload.restarted()
        self._write_down()
        self._report("the server answers again")

    def _has_recovered(self, answers_since: float | None) -> bool:
        return answers_since is not None and time.monotonic() - answers_since >= self._restart.healthy_seconds

    def _last_word(self, error: ServerError, deaths: int) -> ServerError:
        if not self._restart.limit:
            return error
        return ServerError(
            f"the server died {deaths} times in a row, each time within {self._restart.healthy_seconds:g} s; {error}"
        )

    @property
    def _version(self) -> int:
        if self._server.live is not None:
            return self._server.live.current.version
        return Versions.of(read_manifest(self._server.repository)).current

    def _write_down(self) -> None:
        server = self._server
        write_state(
            ServerState(
                process_id=os.getpid(), repository=str(server.repository.absolute()), grpc_url=server.grpc_url,
                http_url=server.http_url, metrics_url=server.metrics_url, log_file=str(server.log_file),
                key=server.key, version=self._version, restarts=self._restarts,
            )
        )


@dataclass(frozen=True)
class ServerState:
    """One running rekd-serve."""

    process_id: int
    """Of rekd-serve itself."""
    repository: str
    grpc_url: str
    http_url: str
    metrics_url: str
    log_file: str
    key: str
    """Of the restricted interfaces."""
    version: int
    """Of the export that is served."""
    restarts: int = 0
    """How often the server had to be started again."""

    @property
    def urls(self) -> tuple[str, str]:
        """The addresses under which clients know it."""
        return self.grpc_url, self.http_url


def write_state(state: ServerState) -> Path:
    """Write it where only this user can read it; returns the file."""
    folder = user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_PREFIX}{state.process_id}.json"
    work = path.with_suffix(".new")
    work.unlink(missing_ok=True)
    # readable to others at no moment
    descriptor = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(state), file, indent=2)
    work.replace(path)
    return path


def remove_state(process_id: int) -> None:
    """Forget a rekd-serve that ends."""
    (user_folder() / f"{_PREFIX}{process_id}.json").unlink(missing_ok=True)


def running_states() -> list[ServerState]:
    """This user's running servers, by process id; what killed ones left behind is removed."""
    return sorted(_running(), key=lambda state: state.process_id)


def _running() -> Iterator[ServerState]:
    for path in user_folder().glob(f"{_PREFIX}*.json"):
        with suppress(OSError, ValueError, TypeError):
            state = ServerState(**json.loads(path.read_text(encoding="utf-8")))
            if has_ended(state.process_id):
                path.unlink(missing_ok=True)
            else:
                yield state
