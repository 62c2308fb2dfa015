"""Inputs handed to a server on this machine in shared memory, wherever that works; else over the wire. torch-free.

Only inputs: they are the bulk (an answer has a third of a text's bytes, and next to nothing of an image's), and an
answer that the server writes into memory of ours could come late, into a region already used for another request.

What keeps answers right: a region serves one request at a time, whichever thread sends it, and is used again only once
that request was answered; a request that the server refuses is asked again over the wire, so that nothing about memory
ever becomes an answer or an error. Region names are random and never used twice.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from rekd_deploy.client.transport import Arrays, ModelConfig, RegionInput, Transport
from rekd_deploy.errors import ClientError, DeadlineError, ServerUnavailableError

_ALIGNMENT = 64
_SMALLEST = 1 << 16
_PATIENCE = 60.0
"""Seconds that inputs go over the wire once memory was refused, before it is tried again: servers are restarted."""
_GOODBYE_SECONDS = 2.0
"""How long the server may take to let go of a region."""


class SharedInputs(Transport):
    """A transport whose inputs lie in shared memory.

    Args:
        wire: the transport that carries everything else; closed with this one.
        timeout: seconds an answer may take where a request says nothing else.
    """

    def __init__(self, wire: Transport, timeout: float) -> None:
        self._wire = wire
        self._timeout = timeout
        self._lock = threading.Lock()
        self._free: list[_Region] = []
        self._retired: list[_Region] = []
        self._all: set[_Region] = set()
        self._not_before = -math.inf
        # a client that nobody closes leaves nothing behind in memory either
        self._clean_up = weakref.finalize(self, _destroy_all, self._all)

    def model_versions(self, model: str, timeout: float) -> list[str]:
        return self._wire.model_versions(model, timeout)

    def model_config(self, model: str, version: str, timeout: float) -> ModelConfig:
        return self._wire.model_config(model, version, timeout)

    def submit(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray | RegionInput],
        outputs: Sequence[str],
        *,
        timeout: float | None = None,
        request_id: str = "",
    ) -> Future[Arrays]:
        timeout = self._timeout if timeout is None else timeout
        until = time.monotonic() + timeout
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        region = self._region(sum(_aligned(array.nbytes) for array in arrays.values()), timeout)
        placed = None if region is None else self._placed(region, arrays)
        if region is None or placed is None:
            return self._wire.submit(model, arrays, outputs, timeout=timeout, request_id=request_id)
        try:
            first = self._wire.submit(model, placed, outputs, timeout=timeout, request_id=request_id)
        except BaseException:
            self._retire(region)
            raise
        whole: Future[Arrays] = Future()

        def again() -> None:
            remaining = max(until - time.monotonic(), 0.001)
            second = self._wire.submit(model, arrays, outputs, timeout=remaining, request_id=request_id)
            whole.add_done_callback(lambda _: second.cancel())
            second.add_done_callback(lambda done: _hand_over(done, whole))

        def answered(done: Future[Arrays]) -> None:
            if not done.cancelled() and done.exception() is None:
                region.answered = True
                self._give_back(region)
                _hand_over(done, whole)
                return
            self._retire(region)  # the server may still read it
            if done.cancelled() or isinstance(done.exception(), (ServerUnavailableError, DeadlineError)):
                _hand_over(done, whole)
                return
            if not region.answered:  # it never worked: this server will not have it
                self._rest()
            try:
                again()
            except Exception as error:
                _fail(whole, error)

        whole.add_done_callback(lambda done: first.cancel() if done.cancelled() else None)
        first.add_done_callback(answered)
        return whole

    def explained(self, error: ClientError) -> ClientError:
        return self._wire.explained(error)

    def close(self) -> None:
        self._not_before = math.inf
        with self._lock:
            regions = [*self._all]
        for region in regions:
            self._forget(region)
        self._wire.close()
        self._clean_up()

    def _region(self, size: int, timeout: float) -> _Region | None:
        """A region of at least this size that nobody uses; None: not now."""
        if time.monotonic() < self._not_before:
            return None
        with self._lock:
            fitting = next((region for region in self._free if region.size >= size), None)
            if fitting is not None:
                self._free.remove(fitting)
                return fitting
            self._retired += self._free  # regions grow with what is asked
            self._free.clear()
            retired, self._retired = self._retired, []
        for each in retired:
            self._forget(each)
        region = None
        try:
            region = _Region(max(_SMALLEST, 1 << (size - 1).bit_length()))
            with self._lock:
                self._all.add(region)
            self._wire.register_region(region.name, region.key, region.size, timeout)
        except (ClientError, OSError):  # refused, or no room left
            if region is not None:
                self._retire(region)
            self._rest()
            return None
        return region

    def _placed(self, region: _Region, arrays: Mapping[str, np.ndarray]) -> dict[str, RegionInput] | None:
        try:
            return region.place(arrays)
        except OSError:
            self._retire(region)
            self._rest()
            return None

    def _rest(self) -> None:
        self._not_before = max(self._not_before, time.monotonic() + _PATIENCE)

    def _give_back(self, region: _Region) -> None:
        with self._lock:
            self._free.append(region)

    def _retire(self, region: _Region) -> None:
        """Never use it again. The server, which may still read it, is told later."""
        region.destroy()
        with self._lock:
            self._retired.append(region)

    def _forget(self, region: _Region) -> None:
        """Have the server let go of it; one that it still reads it keeps, and says so."""
        with contextlib.suppress(ClientError):
            self._wire.unregister_region(region.name, _GOODBYE_SECONDS)
        region.destroy()
        with self._lock:
            self._all.discard(region)


def _hand_over(done: Future[Arrays], whole: Future[Arrays]) -> None:
    if done.cancelled():
        whole.cancel()
    elif done.exception() is not None:
        _fail(whole, done.exception())
    elif whole.set_running_or_notify_cancel():
        whole.set_result(done.result())


def _fail(whole: Future[Arrays], error: BaseException) -> None:
    if whole.set_running_or_notify_cancel():
        whole.set_exception(error)


class _Region:
    """A shared memory object of this process."""

    def __init__(self, size: int) -> None:
        from tritonclient.utils import shared_memory

        self.name = f"rekd_client_{secrets.token_hex(16)}"
        self.key = f"/{self.name}"
        self.size = size
        self.answered = False
        """Whether a request out of it was ever answered."""
        self._library = shared_memory
        self._lock = threading.Lock()
        try:
            self._handle: Any = shared_memory.create_shared_memory_region(self.name, self.key, size, create_only=True)
        except shared_memory.SharedMemoryException as error:
            raise OSError(str(error.__cause__ or error)) from None

    def place(self, arrays: Mapping[str, np.ndarray]) -> dict[str, RegionInput]:
        """Copy arrays into the region, one behind the other; OSError: it is gone."""
        placed, offset = {}, 0
        for name, array in arrays.items():
            try:
                self._library.set_shared_memory_region(self._handle, [array], offset)
            except self._library.SharedMemoryException as error:
                raise OSError(str(error)) from None
            placed[name] = RegionInput(self.name, offset, array)
            offset += _aligned(array.nbytes)
        return placed

    def destroy(self) -> None:
        """Take it out of this machine's memory, as soon as nobody has it mapped; safe to call twice."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(OSError):  # somebody else has removed it
                self._library.destroy_shared_memory_region(handle)


def _destroy_all(regions: set[_Region]) -> None:
    for region in regions:
        region.destroy()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
