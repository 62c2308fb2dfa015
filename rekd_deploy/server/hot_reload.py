"""A new export takes the served one's place in a running server, without a failed request.

    1. what was published is copied and held against its manifest
    2. the new version of each step is loaded beside the old one
    3. the ensembles, whose steps name the versions they run, are exchanged: each request runs in the old or the new
    4. the old version leaves when the last request that needs it has been answered

Whatever goes wrong before step 3 leaves the old version serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from rekd_deploy.errors import RepositoryError, ServerError
from rekd_deploy.server.exchange_rules import is_ensemble, model_processes, reasons_not_to_exchange, side_by_side
from rekd_deploy.server.live_repository import LiveRepository, Snapshot
from rekd_deploy.server.model_control import ModelControl
from rekd_deploy.server.server import TritonServer

_LEAVE_SECONDS = 60.0
_RESTART = "fix: start rekd-serve again to serve it"


class _Leaving(NamedTuple):
    snapshot: Snapshot
    since: float
    steps: list[str]
    """Models whose old version has not been let go yet."""


class HotReload:
    """Watches where exports are published, and exchanges what a server serves.

    Call ``poll`` regularly, from one thread.

    Args:
        server: started with ``reload=True``.
        drain_seconds: how long the old version stays at least after the exchange, for requests that have begun in it.
        report: called with a line for each thing that happens.
    """

    def __init__(
        self, server: TritonServer, drain_seconds: float = 30.0, report: Callable[[str], None] = lambda line: None
    ) -> None:
        if server.live is None:
            raise ServerError("this server was not started for reloading; fix: TritonServer(..., reload=True)")
        self._server = server
        self._live: LiveRepository = server.live
        self._drain_seconds = drain_seconds
        self._report = report
        self._seen: tuple[int, ...] | None = self._live.stamp()
        self._complaint = ""
        self._died_with: tuple[int, ...] | None = None
        self._leaving: _Leaving | None = None

    def poll(self) -> None:
        """Look once, and do what there is to do; loading takes as long as it takes.

        Raises:
            ServerError: the server died, or could not be brought back to the version it served.
        """
        if self._leaving is not None:
            self._let_leave()
        elif (stamp := self._live.stamp()) is not None and stamp != self._seen:
            self._take(stamp)

    def restarted(self) -> None:
        """The server was started anew, with one version."""
        if self._leaving is not None:
            self._live.remove_copy(self._leaving.snapshot)
        self._leaving = None

    def _take(self, stamp: tuple[int, ...]) -> None:
        old = self._live.current
        try:
            new = self._live.snapshot()
        except (RepositoryError, OSError) as error:  # not whole yet, perhaps: said once, tried again
            self._complain(f"not reloaded yet: {error}")
            return
        self._seen, self._complaint = stamp, ""
        if new.manifest == old.manifest:
            self._live.remove_copy(new)
            return
        reasons = reasons_not_to_exchange(old.configs, new.configs, old.description, new.description)
        if new.version == old.version:
            reasons.insert(0, f"it has the number {new.version} of the one that is served")
        if reasons:
            self._live.remove_copy(new)
            self._report(f"not reloaded: {'; '.join(reasons)}; version {old.version} serves on; {_RESTART}")
            return
        try:
            with ModelControl(self._server.grpc_url, self._server.key) as control:
                self._exchange(control, old, new)
        except ServerError:
            self._after_a_death(stamp, new)
            raise

    def _after_a_death(self, stamp: tuple[int, ...], new: Snapshot) -> None:
        """Once may be chance; an export with which the server dies twice is not tried a third time."""
        if self._live.current is new:
            return
        self._live.remove_copy(new)
        if self._died_with != stamp:
            self._died_with, self._seen = stamp, None
        else:
            self._report(f"not reloaded: the server died twice while it loaded version {new.version}; {_RESTART}")

    def _exchange(self, control: ModelControl, old: Snapshot, new: Snapshot) -> None:
        began = time.monotonic()
        self._live.place(new)
        try:
            for name in _steps(new):
                versions = (old.version, new.version) if name in old.configs else (new.version,)
                self._live.configure(name, side_by_side(new.configs[name], versions))
                control.load(name)
            for name in _ensembles(new):
                self._live.configure(name, new.configs[name])
                control.load(name)
        except ServerError as error:
            self._server.check_running()  # not its models' processes: loading may have put others in their place
            self._go_back(control, old, new)
            self._report(f"not reloaded: {error}; version {old.version} serves on")
            return
        self._live.current = new
        # under the new configuration, in which the number of instances may be another, there are both versions
        both = model_processes(new.configs, _steps(new)) + model_processes(new.configs, _steps(old))
        self._server.watch_models(both - model_processes(old.configs, _steps(old)))
        self._leaving = _Leaving(old, time.monotonic(), _steps(old))
        seconds = time.monotonic() - began
        self._report(f"reloaded in {seconds:.1f} s: version {new.version} answers, {old.version} until now")

    def _go_back(self, control: ModelControl, old: Snapshot, new: Snapshot) -> None:
        for name in [*_ensembles(old), *_steps(old)]:
            self._live.configure(name, old.configs[name])
            control.load(name)
        for name in new.configs.keys() - old.configs.keys():
            with suppress(ServerError):  # it may not have been loaded
                control.unload(name)
        self._live.remove(new)
        self._server.watch_models(0)

    def _let_leave(self) -> None:
        old, since, steps = self._leaving
        if time.monotonic() - since < self._drain_seconds:
            return
        try:
            with ModelControl(self._server.grpc_url, self._server.key) as control:
                if _still_there(control, _ensembles(old), old.version):
                    return  # a request is on its way through it
                while steps:
                    self._let_step_leave(control, steps[0], old.version)
                    del steps[0]
        except ServerError as error:  # a server that is silent for a moment is not dead
            self._server.check_running()
            self._complain(f"version {old.version} has not left yet: {error}")
            return
        self._live.remove(old)
        self._leaving, self._complaint = None, ""
        self._report(f"version {old.version} has left")

    def _let_step_leave(self, control: ModelControl, name: str, version: int) -> None:
        new = self._live.current
        self._live.configure(name, new.configs[name])
        control.load(name)
        deadline = time.monotonic() + _LEAVE_SECONDS
        while time.monotonic() < deadline:
            try:
                if not _still_there(control, [name], version):
                    break
            except ServerError:
                self._server.check_running()
            time.sleep(0.05)
        self._server.watch_models(-model_processes(new.configs, [name]))

    def _complain(self, line: str) -> None:
        if line != self._complaint:
            self._report(line)
        self._complaint = line


def _steps(snapshot: Snapshot) -> list[str]:
    return [name for name, config in snapshot.configs.items() if not is_ensemble(config)]


def _ensembles(snapshot: Snapshot) -> list[str]:
    return [name for name, config in snapshot.configs.items() if is_ensemble(config)]


def _still_there(control: ModelControl, models: Iterable[str], version: int) -> bool:
    states = control.states()
    return any(version in states.get(name, {}) for name in models)
