"""What a client says to a server and makes of the answers: all of it but the waiting. torch-free.

``Client`` and ``AsyncClient`` drive the same conversation (``waiting.py``), so they answer alike.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

from rekd_deploy.client.batching import Questions
from rekd_deploy.client.retry import RetryPolicy
from rekd_deploy.client.served_model import ServedModel, ServedVersion
from rekd_deploy.client.transport import Arrays, Transport
from rekd_deploy.client.waiting import Pause, Reply, Steps, Work
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import ClientError, DeadlineError, VersionMismatchError
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.preprocessors import Encoded

IN_FLIGHT = 4
"""Requests of one call on their way at once: enough to keep the server's batcher busy while answers are read."""
_OUTPUTS = ("scores", "mask", "probabilities")
_LONGEST_ID = 128
_GRACE = 0.5
"""Seconds by which the transport's own time-out, which knows more, may come first."""
_READINGS = 3
"""How often a call starts anew because the server has another model since."""


class _Exchanged(Exception):
    """The model that answered is not the one that was prepared for."""


class _Batches:
    """Batches of one call, with a look ahead."""

    def __init__(self, batches: Iterator[tuple[list[int], Encoded]]) -> None:
        self._batches = batches
        self._ahead: list[tuple[list[int], Encoded]] = []

    def take(self) -> tuple[list[int], Encoded] | None:
        """The next one; None: there is none."""
        return self._ahead.pop() if self._ahead else next(self._batches, None)

    def more(self) -> bool:
        """Whether there is a next one; it is prepared for that."""
        if not self._ahead:
            self._ahead += [batch] if (batch := next(self._batches, None)) else []
        return bool(self._ahead)


@dataclass(frozen=True)
class _Call:
    """One call of predict."""

    request_id: str
    limit: float | None
    """Seconds the call may take."""
    until: float
    """The same as a moment of ``time.monotonic``."""
    timeout: float
    """Seconds one request may take."""
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def next_id(self) -> str:
        """The first request has the call's own id, later ones a number too."""
        number = next(self.numbers)
        return self.request_id if number == 1 else f"{self.request_id}-{number}"

    def remaining(self) -> float:
        """Seconds left for the next request.

        Raises:
            DeadlineError: none.
        """
        left = self.until - time.monotonic()
        if left <= 0:
            raise DeadlineError(
                f"the call was not finished within {self.limit:g} s (request {self.request_id}); fix: a longer deadline"
            )
        return min(left, self.timeout)


@dataclass(frozen=True)
class _Sent:
    """A request on its way."""

    places: list[int]
    encoded: Encoded
    request_id: str
    future: Future[Arrays]
    until: float
    attempts: int


class Conversation:
    """Everything that sync and asyncio share.

    Args:
        url: of the server, for messages.
        model: name of the ensemble or single graph.
        transport: what speaks to the server.
        timeout: seconds one request may take.
        retry: when a failed request is sent again.
        preprocessing: fingerprint that the served model must have; None: any.
    """

    def __init__(
        self,
        url: str,
        model: str,
        transport: Transport,
        timeout: float,
        retry: RetryPolicy,
        preprocessing: str | None,
    ) -> None:
        self.transport = transport
        self._model = ServedModel(url, model, transport, preprocessing)
        self._timeout = timeout
        self._retry = retry

    def describe(self) -> Steps[ServedDescription]:
        """What the server says about the model."""
        served = yield from self._read(self._call(None, None))
        return served.description

    def predict(
        self, items: Sequence[Any], *, windows: bool, deadline: float | None, request_id: str | None
    ) -> Steps[list[Prediction]]:
        """See ``Client.predict``."""
        call = self._call(deadline, request_id)
        for _ in range(_READINGS):
            served = yield from self._read(call)
            try:
                return (yield from self._ask(served, items, windows, call))
            except _Exchanged:
                continue
        raise VersionMismatchError(
            f"the server at {self._model.url} changed the model '{self._model.name}' {_READINGS} times during one "
            "call; fix: ask again once it serves one version"
        )

    def _call(self, deadline: float | None, request_id: str | None) -> _Call:
        if deadline is not None and not deadline > 0:
            raise InputError(f"deadline is {deadline:g} s; it must be more than 0")
        if request_id is None:
            request_id = secrets.token_hex(8)
        elif not (isinstance(request_id, str) and request_id.isprintable() and 0 < len(request_id) <= _LONGEST_ID):
            raise InputError(f"request_id must be one line of 1..{_LONGEST_ID} printable characters")
        until = float("inf") if deadline is None else time.monotonic() + deadline
        return _Call(request_id, deadline, until, self._timeout)

    def _ask(self, served: ServedVersion, items: Sequence[Any], windows: bool, call: _Call) -> Steps[list[Prediction]]:
        """Send every batch, a few at a time, and read the answers."""
        questions = Questions(served.preprocessor, items, served.max_batch_size, windows=windows)
        batches = _Batches(questions.batches())
        waiting: deque[_Sent] = deque()
        more = True
        try:
            while more or waiting:
                while more and len(waiting) < IN_FLIGHT:
                    sent = yield Work(
                        lambda: self._send_next(batches, call),
                        in_this_thread=lambda: self._send_next(
                            batches, call, lone_below=0 if waiting else served.max_batch_size
                        ),
                    )
                    more = sent is not None
                    waiting.extend([sent] if more else [])
                if waiting:
                    sent = waiting[0]
                    try:
                        outputs = yield Reply(sent.future, sent.until + _GRACE - time.monotonic())
                    except TimeoutError:
                        call.remaining()  # raises if it is the call's own deadline
                        raise DeadlineError(
                            f"no answer from {self._model.url} within {call.timeout:g} s (request {sent.request_id}); "
                            "fix: a longer timeout"
                        ) from None
                    except ClientError as error:
                        waiting[0] = yield from self._send_again(sent, error, call)
                        continue
                    waiting.popleft()
                    yield from self._check_version(served, outputs.version, call)
                    items = () if windows else sent.places  # else they are places of windows
                    predictions = yield Work(
                        partial(self._model.predictions, served, sent.encoded, outputs, sent.request_id, items)
                    )
                    questions.answer(sent.places, predictions)
        finally:
            for sent in waiting:
                sent.future.cancel()
        return (yield Work(questions.answers))

    def _send_next(self, batches: _Batches, call: _Call, *, lone_below: int = 0) -> _Sent | None:
        """The next request on its way; None: there is none.

        Args:
            lone_below: the answer to fewer items is waited for here if no other request follows. After a full batch
                one is likely to, and to look would keep the server waiting.
        """
        batch = batches.take()
        if batch is None:
            return None
        places, encoded = batch
        request = _Sent(places, encoded, call.next_id(), Future(), 0.0, 0)
        return self._send(request, call, wait=len(places) < lone_below and not batches.more())

    def _send(self, request: _Sent, call: _Call, *, wait: bool = False) -> _Sent:
        timeout = call.remaining()
        until = time.monotonic() + timeout
        question = (self._model.name, request.encoded.inputs, _OUTPUTS)
        how = {"timeout": timeout, "request_id": request.request_id}
        try:
            if wait and (outputs := self.transport.ask(*question, **how)) is not None:
                future: Future[Arrays] = Future()
                future.set_result(outputs)
            else:
                future = self.transport.submit(*question, **how)
        except ClientError as error:  # as if the answer had said so
            future = Future()
            future.set_exception(error)
        return replace(request, future=future, until=until, attempts=request.attempts + 1)

    def _send_again(self, sent: _Sent, error: ClientError, call: _Call) -> Steps[_Sent]:
        """The request once more, after a pause; or the error."""
        pause = self._retry.pause(error, sent.attempts, call.until - time.monotonic())
        if pause is None:
            raise error
        yield Pause(pause)
        return (yield Work(lambda: self._send(sent, call)))

    def _read(self, call: _Call, version: str = "") -> Steps[ServedVersion]:
        """What the server says about a version of the model; about the newest where none is named. Read once."""
        attempts = 0
        while (found := self._model.known(version)) is None:
            attempts += 1
            try:
                yield Work(lambda: self._model.read(version, call.remaining))
            except ClientError as error:
                pause = self._retry.pause(error, attempts, call.until - time.monotonic())
                if pause is None:
                    raise (yield Work(partial(self.transport.explained, error))) from None
                yield Pause(pause)
        return found

    def _check_version(self, served: ServedVersion, version: str, call: _Call) -> Steps[None]:
        """The server may have loaded another version since: its tokens and labels must be those asked with."""
        if version in ("", served.version):
            return
        found = yield from self._read(call, version)
        self._model.prefer(found)
        if found.description != served.description:
            raise _Exchanged
