"""A server that is looked after: watched, started again when it dies, given new exports; until it is stopped.

A new export takes the served one's place in the running server, without a failed request:

    1. what was published is copied and checked against its manifest
    2. the new version of each step is loaded beside the old one
    3. the ensembles, whose steps name the versions they run, are exchanged: each request runs in the old or the new
    4. the old version leaves when the last request that needs it has been answered

Whatever goes wrong before step 3 leaves the old version serving.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rekd_deploy.errors import RepositoryError, ServerError
from rekd_deploy.repository.manifest import Versions
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.server.live_repository import Snapshot, model_control, reasons_not_to_exchange
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.status import ServerState, remove_state, write_state

_LOOK_SECONDS = 0.2
_DRAIN_SECONDS = 30.0
"""How long the old version stays at least after the exchange, for requests that have begun in it."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a server is started again; each further pause is twice as long."""
_HEALTHY_SECONDS = 60.0
"""A server that has run this long has recovered: the counting of deaths begins anew."""


class HotReload:
    """Watches where exports are published, and exchanges what a server with ``reload=True`` serves.

    Call ``poll`` regularly, from one thread.
    """

    def __init__(self, server: TritonServer, report: Callable[[str], None]) -> None:
        self._server = server
        self._live = server.live
        self._report = report
        self._tried: dict[str, Any] = {}
        """Manifest of the export that was tried last; it is not tried again."""
        self._said = ""
        self._leaving: tuple[Snapshot, float] | None = None
        """What was served until that moment, by ``time.monotonic``."""

    def poll(self) -> bool:
        """Look once, and do what there is to do; returns whether another version serves from now on.

        Raises ServerError if the server died, or could not be brought back to the version it served.
        """
        if self._leaving is not None:
            self._let_leave(*self._leaving)
            return False
        if self._live.published() in (None, self._live.current.manifest, self._tried):
            return False
        old, new = self._live.current, None
        try:
            new = self._live.snapshot()
            reasons = reasons_not_to_exchange(old, new)
        except (RepositoryError, OSError) as error:  # what is not whole yet, perhaps, is tried again, and said once
            if new is not None:
                shutil.rmtree(new.root, ignore_errors=True)  # it was not placed
            self._say(f"not reloaded yet: {error}")
            return False
        self._tried = new.manifest
        if reasons:
            self._live.remove(new)
            fix = "fix: start rekd-serve again to serve it"
            self._say(f"not reloaded: {'; '.join(reasons)}; version {old.version} serves on; {fix}")
            return False
        with model_control(self._server.grpc_url, self._server.key) as call:
            return self._exchange(call, old, new)

    def restarted(self) -> None:
        """The server was started anew, with one version."""
        self._leaving = None

    def _exchange(self, call: Callable[..., Any], old: Snapshot, new: Snapshot) -> bool:
        began, begun = time.monotonic(), set()
        try:
            self._live.place(new)
            for name in [*new.steps, *new.ensembles]:
                begun.add(name)
                self._load(call, new, name, *([old.version] if name in old.configs and name in new.steps else []))
        except (ServerError, OSError) as error:
            try:
                self._server.check_alive()
                for name in filter(begun.__contains__, [*old.ensembles, *old.steps]):
                    self._load(call, old, name)
                for name in begun - old.configs.keys():
                    with suppress(ServerError):  # it may not have been loaded
                        call("unload_model", name)
            except OSError as further:
                raise ServerError(f"version {old.version} cannot be brought back: {further}") from None
            finally:
                self._live.remove(new)
                self._say(f"not reloaded: {error}; version {old.version} serves on")
            return False
        self._live.current, self._leaving = new, (old, time.monotonic())
        self._say(f"reloaded in {time.monotonic() - began:.1f} s: version {new.version} answers, not {old.version}")
        return True

    def _let_leave(self, old: Snapshot, since: float) -> None:
        if time.monotonic() - since < _DRAIN_SECONDS:
            return
        try:
            with model_control(self._server.grpc_url, self._server.key) as call:
                index = call("get_model_repository_index").models
                ours = [each for each in index if each.name in old.configs and each.version == str(old.version)]
                states = {each.name: each.state for each in ours}
                staying = {name for name, state in states.items() if state not in ("", "UNAVAILABLE")}
                if staying.intersection(old.ensembles):
                    return  # a request is on its way through it
                for name in staying:
                    if states[name] == "READY":
                        self._load(call, self._live.current, name)
        except (ServerError, OSError) as error:  # silent for a moment, or a full disk: it is not dead
            self._server.check_alive()
            self._say(f"version {old.version} has not left yet: {error}")
            return
        if not staying:
            self._live.remove(old)
            self._leaving = None
            self._say(f"version {old.version} has left")

    def _load(self, call: Callable[..., Any], snapshot: Snapshot, name: str, *beside: int) -> None:
        """One version of a model as it was exported, with other versions beside it."""
        self._live.configure(snapshot, name, beside)
        call("load_model", name)

    def _say(self, line: str) -> None:
        """Report a line, unless it was the last one, too."""
        if line != self._said:
            self._report(line)
        self._said = line


class Service:
    """Runs a server.

    Args:
        server: not started yet; with ``reload=True`` it is given new exports.
        restart_limit: how often in a row it is started again when it dies; 0: a death ends the service.
        report: called with a line for each thing that happens.
    """

    def __init__(self, server: TritonServer, restart_limit: int, report: Callable[[str], None]) -> None:
        self._server = server
        self._limit = restart_limit
        self._report = report
        self._reload = HotReload(server, report) if server.live is not None else None
        self._restarts = 0

    def run(self, ready: Callable[[], None] = lambda: None, stopped: threading.Event | None = None) -> None:
        """Serve until ``stopped`` is set, or an exception such as KeyboardInterrupt comes.

        Args:
            ready: called once, when the server answers for the first time.
            stopped: ends it; None: nothing does but an exception.

        Raises what ``TritonServer.start`` does, and ServerError if it died and is not (or no more) started again.
        """
        stopped = stopped or threading.Event()
        deaths = 0
        with self._server:
            try:
                self._write_down()
                ready()
                answers_since = time.monotonic()
                while not stopped.wait(_LOOK_SECONDS):
                    try:
                        if self._server.process_id is None:
                            self._start_again()
                            answers_since = time.monotonic()
                        self._server.check_alive()
                        if self._reload is not None and self._reload.poll():
                            self._write_down()
                    except (ServerError, OSError) as error:  # a full disk must not end it
                        recovered = time.monotonic() - answers_since >= _HEALTHY_SECONDS
                        deaths, answers_since = 1 if recovered else deaths + 1, math.inf
                        self._recover(error, deaths, stopped)
            finally:
                remove_state(os.getpid())

    def _recover(self, error: Exception, deaths: int, stopped: threading.Event) -> None:
        """Stop what is left of the server, and wait before the next start; raise ServerError after too many."""
        if deaths > self._limit:
            often = f"the server died {deaths} times in a row, each time within {_HEALTHY_SECONDS:g} s; "
            raise ServerError(f"{often if self._limit else ''}{error}") from None
        pause = min(_FIRST_PAUSE * 2.0 ** (deaths - 1), _LONGEST_PAUSE)
        kept = f"the log so far is kept as {self._server.log_file}.1"
        self._report(f"{error}\nstarting again in {pause:g} s ({deaths} of {self._limit}); {kept}")
        self._server.stop()
        stopped.wait(pause)

    def _start_again(self) -> None:
        self._server.start()
        self._restarts += 1
        if self._reload is not None:
            self._reload.restarted()
        self._write_down()
        self._report("the server answers again")

    def _write_down(self) -> None:
        server = self._server
        manifest = server.live.current.manifest if server.live else read_manifest(server.repository)
        write_state(
            ServerState(
                process_id=os.getpid(), repository=str(server.repository.absolute()), grpc_url=server.grpc_url,
                http_url=server.http_url, metrics_url=server.metrics_url, log_file=str(server.log_file),
                key=server.key, version=Versions.of(manifest).current, restarts=self._restarts,
                beside={each.model: str(each.repository.absolute()) for each in server.beside},
            )
        )  # fmt: skip
