"""The calls of a client: requests in flight, retries, deadlines, and the predictions in order. torch-free.

``Client`` makes a call in the caller's thread, ``AsyncClient`` in a thread of its own, so both predict the same.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any

from rekd_deploy.client.batching import Batches
from rekd_deploy.client.connection import RetryPolicy
from rekd_deploy.client.served_model import ServedModel, ServedVersion
from rekd_deploy.client.transport import Arrays, Transport
from rekd_deploy.errors import ClientError, DeadlineError, ServerUnavailableError, VersionMismatchError
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.preprocessors import Encoded

IN_FLIGHT = 4
"""Requests of one call on their way at once: enough to keep the server's batcher busy while responses are read."""
_OUTPUTS = ("scores", "mask", "probabilities")
_GRACE = 0.5
"""Seconds by which the transport's own time-out, which knows more, may come first."""
_LONGEST_ID = 128
_READINGS = 3
"""How often a call starts anew because the server has another model since."""


class Call:
    """The time, the ids and the end of one call.

    Args:
        timeout: seconds one request may take.
        deadline: seconds the whole call may take; None: as long as it takes.
        request_id: of the first request; later ones have a number behind it. None: a random one.
        cancellable: another thread may cancel it.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self, timeout: float, deadline: float | None = None, request_id: str | None = None, *, cancellable: bool = False
    ) -> None:
        if deadline is not None and not deadline > 0:
            raise InputError(f"deadline is {deadline:g} s; it must be more than 0")
        if request_id is None:
            request_id = secrets.token_hex(8)
        elif not (isinstance(request_id, str) and request_id.isprintable() and 0 < len(request_id) <= _LONGEST_ID):
            raise InputError(f"request_id must be one line of 1..{_LONGEST_ID} printable characters")
        self.timeout = timeout
        self.deadline = deadline
        self.cancellable = cancellable
        self._until = float("inf") if deadline is None else time.monotonic() + deadline
        self._request_id = request_id
        self._numbers = count(1)
        self._cancelled = threading.Event()
        self._wake = threading.Event()

    def next_id(self) -> str:
        """The id of the next request."""
        number = next(self._numbers)
        return self._request_id if number == 1 else f"{self._request_id}-{number}"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._until - time.monotonic()

    def remaining(self) -> float:
        """Seconds that the next request may take.

        Raises:
            DeadlineError: none are left.
            CancelledError: the call was cancelled.
        """
        if self._cancelled.is_set():
            raise CancelledError
        if self.left <= 0:
            raise self.too_late()
        return min(self.left, self.timeout)

    def too_late(self) -> DeadlineError:
        """The error of a call that is beyond its deadline."""
        return DeadlineError(
            f"the call was not finished within {self.deadline:g} s (request {self._request_id}); fix: a longer deadline"
        )

    def cancel(self) -> None:
        """End it: whatever it waits for raises CancelledError."""
        self._cancelled.set()
        self._wake.set()

    def pause(self, seconds: float) -> None:
        """Wait, or until it is cancelled."""
        self._cancelled.wait(seconds)

    def result(self, future: Future[Arrays], until: float) -> Arrays:
        """What a request's future holds.

        Raises:
            TimeoutError: it does not at the moment ``until``.
            CancelledError: the call was cancelled.
            ClientError: the request failed.
        """
        if self.cancellable:
            future.add_done_callback(lambda _: self._wake.set())
            while not future.done():
                if not self._wake.wait(max(until - time.monotonic(), 0)):
                    raise TimeoutError
                self._wake.clear()
                if self._cancelled.is_set():
                    raise CancelledError
        try:
            return future.result(max(until - time.monotonic(), 0))
        except CancelledError:
            raise ServerUnavailableError("the connection was closed before the response came") from None


class _Exchanged(Exception):
    """The response is of another model than the request was prepared for."""


@dataclass
class _Request:
    """A request on its way."""

    indices: list[int]
    encoded: Encoded
    request_id: str
    future: Future[Arrays] = field(default_factory=Future)
    until: float = 0.0
    attempts: int = 0


class Caller:
    """Makes the calls of one client. Safe to use from several threads.

    Args:
        url: of the server, for messages.
        model: name of the ensemble or single graph.
        transport: what speaks to the server.
        retry: when a failed request is sent again.
        preprocessing: fingerprint that the served model must have; None: any.
    """

    def __init__(
        self, url: str, model: str, transport: Transport, retry: RetryPolicy, preprocessing: str | None
    ) -> None:
        self._transport = transport
        self._model = ServedModel(url, model, transport, preprocessing)
        self._retry = retry
        self._closed = False

    def close(self) -> None:
        """Close the connections; calls on their way fail."""
        self._closed = True
        self._transport.close()

    def served(self, call: Call, version: str = "") -> ServedVersion:
        """What the server says about a version of the model; about the newest where none is named. Read once."""
        attempts = 0
        while (found := self._model.known(version)) is None:
            attempts += 1
            try:
                self._model.read(version, call.remaining)
            except ClientError as error:
                if not self._paused(error, attempts, call):
                    raise self._transport.explained(error) from None
        return found

    def predict(self, call: Call, items: Sequence[Any], windows: bool) -> list[Prediction]:
        """See ``Client.predict``."""
        for _ in range(_READINGS):
            served = self.served(call)
            try:
                return self._predict(call, served, items, windows)
            except _Exchanged:
                continue
        raise VersionMismatchError(
            f"the server at {self._model.url} changed the model '{self._model.name}' {_READINGS} times during one "
            "call; fix: call again once it serves one version"
        )

    def _predict(self, call: Call, served: ServedVersion, items: Sequence[Any], windows: bool) -> list[Prediction]:
        """Send every batch, a few at a time, and read the responses."""
        batches = Batches(served.preprocessor, items, served.max_batch_size, windows=windows)
        coming = iter(batches)
        ahead = [next(coming)]
        few = len(ahead[0][0]) < served.max_batch_size
        ahead += islice(coming, few)  # after a full batch another is likely, and to look would keep the server waiting
        lone = few and len(ahead) == 1
        in_flight: deque[_Request] = deque()

        def take() -> None:
            outputs = self._outputs(in_flight[0], call)
            request = in_flight.popleft()
            self._check_version(served, outputs.version, call)
            named = () if windows else request.indices  # else they are indices of windows
            batches.collect(
                request.indices, self._model.predictions(served, request.encoded, outputs, request.request_id, named)
            )

        try:
            for indices, encoded in chain(ahead, coming):
                in_flight.append(_Request(indices, encoded, call.next_id()))
                self._send(in_flight[-1], call, wait=lone and not call.cancellable)
                if len(in_flight) == IN_FLIGHT:
                    take()
            while in_flight:
                take()
        finally:
            for request in in_flight:
                request.future.cancel()
        return batches.predictions()

    def _send(self, request: _Request, call: Call, *, wait: bool = False) -> None:
        """Put a request on its way; its future has the response, or the reason why it could not be sent.

        Args:
            wait: for the response, in this thread, where the transport can.
        """
        self._check_open()
        timeout = call.remaining()
        request.until = time.monotonic() + timeout
        request.attempts += 1
        what = (self._model.name, request.encoded.inputs, _OUTPUTS)
        how = {"timeout": timeout, "request_id": request.request_id}
        try:
            if wait and (outputs := self._transport.infer(*what, **how)) is not None:
                request.future = Future()
                request.future.set_result(outputs)
            else:
                request.future = self._transport.submit(*what, **how)
        except ClientError as error:
            request.future = Future()
            request.future.set_exception(error)

    def _outputs(self, request: _Request, call: Call) -> Arrays:
        """The response to a request, which is sent again where that may help."""
        while True:
            try:
                return call.result(request.future, request.until + _GRACE)
            except TimeoutError:
                call.remaining()  # raises if it is the call's own deadline
                raise DeadlineError(
                    f"no answer from {self._model.url} within {call.timeout:g} s (request {request.request_id}); "
                    "fix: a longer timeout"
                ) from None
            except ClientError as error:
                if not self._paused(error, request.attempts, call):
                    raise
            self._send(request, call)

    def _paused(self, error: ClientError, attempts: int, call: Call) -> bool:
        """Whether to try again after this error; the pause before that is over."""
        self._check_open()
        pause = self._retry.pause(error, attempts, call.left)
        if pause is not None:
            call.pause(pause)
        return pause is not None

    def _check_open(self) -> None:
        if self._closed:
            raise ClientError("the client is closed; fix: open another, or close it once its calls are done")

    def _check_version(self, served: ServedVersion, version: str, call: Call) -> None:
        """The server may have loaded another version since: its tokens and labels must be those of the request."""
        if version in ("", served.version):
            return
        found = self.served(call, version)
        self._model.prefer(found)
        if found.description != served.description:
            raise _Exchanged
