"""How long a call may take and how often a request is sent. torch-free."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from itertools import count

from rekd_deploy.client.transport import Arrays
from rekd_deploy.errors import ClientError, DeadlineError, ServerUnavailableError
from rekd_train.errors import InputError

_LONGEST_ID = 128


@dataclass(frozen=True)
class RetryPolicy:
    """When a request that failed is sent again: if nothing answers, or the server's queue is full.

    That may pass by itself; a refusal, a time-out and a wrong model do not. A response depends on its request alone,
    so sending one twice does no harm. Before each further attempt comes a pause of twice the length, shortened at
    random by up to half, so that clients which failed together do not come back together.
    """

    attempts: int = 4
    """Most times that a request is sent; 1: never again."""
    first_pause: float = 0.1
    """Seconds before the second attempt, at most."""
    longest_pause: float = 5.0
    """Seconds; pauses do not grow beyond."""
    jitter: Callable[[], float] = random.random
    """Numbers within 0..1, uniform; the source of chance."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ClientError(f"attempts is {self.attempts}; it must be at least 1")
        if not 0 <= self.first_pause <= self.longest_pause:
            raise ClientError(
                f"first_pause is {self.first_pause:g} s; it must lie within 0..longest_pause ({self.longest_pause:g} s)"
            )

    def pause(self, error: Exception, attempts_made: int, remaining: float) -> float | None:
        """Seconds to wait before the next attempt; None: there is none.

        Args:
            error: why the last attempt failed.
            attempts_made: so far, at least 1.
            remaining: seconds that the call may still take; a pause that would use them up is not begun.
        """
        if not isinstance(error, ServerUnavailableError) or attempts_made >= self.attempts:
            return None
        longest = min(self.first_pause * 2 ** (attempts_made - 1), self.longest_pause)
        pause = longest * (1 - self.jitter() / 2)
        return pause if pause < remaining else None


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
