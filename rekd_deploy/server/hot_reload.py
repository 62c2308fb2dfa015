"""A new export takes the served one's place in a running server, without a failed request.

    1. what was published is copied and checked against its manifest
    2. the new version of each step is loaded beside the old one
    3. the ensembles, whose steps name the versions they run, are exchanged: each request runs in the old or the new
    4. the old version leaves when the last request that needs it has been answered

Whatever goes wrong before step 3 leaves the old version serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple, Self

from rekd_deploy.errors import RepositoryError, ServerError
from rekd_deploy.server.flags import GRPC_KEY_HEADER
from rekd_deploy.server.live_repository import (
    Snapshot,
    model_processes,
    processes_are_certain,
    reasons_not_to_exchange,
)
from rekd_deploy.server.server import TritonServer

_LEAVE_SECONDS = 60.0
_LOAD_SECONDS = 600.0
_INDEX_SECONDS = 30.0
_GONE = ("", "UNAVAILABLE")
_RESTART = "fix: start rekd-serve again to serve it"


class ModelControl:
    """Triton's model-repository interface, with the key; a context manager. All calls raise ServerError.

    Over gRPC, where loading holds up no response: over HTTP it would hold up the connections that share its thread.

    Args:
        grpc_url: HOST:PORT.
        key: of the restricted interfaces.
    """

    def __init__(self, grpc_url: str, key: str) -> None:
        import tritonclient.grpc

        self._headers = {GRPC_KEY_HEADER: key}
        self._client = tritonclient.grpc.InferenceServerClient(grpc_url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def load(self, model: str) -> None:
        """Load a model again as its folder is now; versions that served serve on until the others are ready."""
        self._request(f"did not load {model}", self._client.load_model, model)

    def unload(self, model: str) -> None:
        """Take a model out of service."""
        self._request(f"did not unload {model}", self._client.unload_model, model)

    def states(self) -> dict[str, dict[int, str]]:
        """Model -> version -> READY, LOADING, UNLOADING; versions that are gone are left out."""
        index = self._request(
            "does not list its models", self._client.get_model_repository_index, seconds=_INDEX_SECONDS
        )
        found: dict[str, dict[int, str]] = {}
        for entry in index.models:
            versions = found.setdefault(entry.name, {})
            if entry.version and entry.state not in _GONE:
                versions[int(entry.version)] = entry.state
        return found

    def _request(self, failure: str, call: Callable[..., Any], *arguments: str, seconds: float = _LOAD_SECONDS) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return call(*arguments, headers=self._headers, client_timeout=seconds)
        except InferenceServerException as error:
            raise ServerError(f"the server {failure}: {' '.join(str(error.message()).split())}") from None


class _Leaving(NamedTuple):
    snapshot: Snapshot
    since: float
    steps: list[str]
    """Models whose old version still has to leave."""


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
        self._live = server.live
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
            self._let_leave(*self._leaving)
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
        if reasons := reasons_not_to_exchange(old, new):
            self._live.remove_copy(new)
            self._report(f"not reloaded: {'; '.join(reasons)}; version {old.version} serves on; {_RESTART}")
            return
        try:
            with self._control() as control:
                self._exchange(control, old, new)
        except ServerError:  # once may be chance; an export with which the server dies twice is not tried a third time
            self._live.remove_copy(new)
            if self._died_with != stamp:
                self._died_with, self._seen = stamp, None
            else:
                self._report(f"not reloaded: the server died twice while it loaded version {new.version}; {_RESTART}")
            raise

    def _exchange(self, control: ModelControl, old: Snapshot, new: Snapshot) -> None:
        began = time.monotonic()
        self._live.place(new)
        try:
            for name in new.steps:
                self._load(control, new, name, *([old.version] if name in old.configs else []))
            for name in new.ensembles:
                self._load(control, new, name)
        except ServerError as error:
            self._server.check_running()  # not its models' processes: loading may have put others in their place
            for name in [*old.ensembles, *old.steps]:
                self._load(control, old, name)
            for name in new.configs.keys() - old.configs.keys():
                with suppress(ServerError):  # it may not have been loaded
                    control.unload(name)
            self._live.remove(new)
            self._server.watch_models(0)
            self._report(f"not reloaded: {error}; version {old.version} serves on")
            return
        self._live.current = new
        self._leaving = _Leaving(old, time.monotonic(), old.steps)
        # under the new configuration, in which the number of instances may be another, there are both versions
        both = model_processes(new, new.steps) + model_processes(new, old.steps)
        self._server.watch_models(both - model_processes(old, old.steps), processes_are_certain(old, new))
        seconds = time.monotonic() - began
        self._report(f"reloaded in {seconds:.1f} s: version {new.version} answers, {old.version} until now")

    def _let_leave(self, old: Snapshot, since: float, steps: list[str]) -> None:
        if time.monotonic() - since < self._drain_seconds:
            return
        try:
            with self._control() as control:
                if _still_there(control, old.ensembles, old.version):
                    return  # a request is on its way through it
                while steps:
                    self._let_step_leave(control, old, steps[0])
                    del steps[0]
        except ServerError as error:  # a server that is silent for a moment is not dead
            self._server.check_running()
            self._complain(f"version {old.version} has not left yet: {error}")
            return
        self._live.remove(old)
        self._leaving, self._complaint = None, ""
        self._report(f"version {old.version} has left")

    def _let_step_leave(self, control: ModelControl, old: Snapshot, name: str) -> None:
        new = self._live.current
        self._load(control, new, name)
        deadline = time.monotonic() + _LEAVE_SECONDS
        while time.monotonic() < deadline:
            try:
                if not _still_there(control, [name], old.version):
                    break
            except ServerError:
                self._server.check_running()
            time.sleep(0.05)
        self._server.watch_models(-model_processes(new, [name]), processes_are_certain(old, new))

    def _load(self, control: ModelControl, snapshot: Snapshot, name: str, *beside: int) -> None:
        """One version of a model as it was exported, with other versions beside it."""
        self._live.configure(snapshot, name, beside)
        control.load(name)

    def _control(self) -> ModelControl:
        return ModelControl(self._server.grpc_url, self._server.key)

    def _complain(self, line: str) -> None:
        if line != self._complaint:
            self._report(line)
        self._complaint = line


def _still_there(control: ModelControl, models: Iterable[str], version: int) -> bool:
    states = control.states()
    return any(version in states.get(name, {}) for name in models)
