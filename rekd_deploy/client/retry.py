"""When a request that failed is sent again. torch-free.

Only what may pass by itself is tried again: nobody answers (yet, or any more), or the server's queue is full. An answer
depends on its request alone, so asking twice does no harm. A refusal, a time-out and a wrong model stay what they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from rekd_deploy.errors import ClientError, ServerUnavailableError


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off: before each further attempt a pause of twice the length, shortened at random by up to
    half, so that clients which failed together do not come back together."""

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
