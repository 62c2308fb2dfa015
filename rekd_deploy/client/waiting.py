"""One conversation, two ways to wait: written once as a generator of steps, driven by a thread or by asyncio.

A generator yields what has to be waited for and is sent the result (or thrown the error); ``run`` blocks the thread
meanwhile, ``run_async`` lets the event loop go on. torch-free.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


class Step(ABC):
    """Something that takes time."""

    @abstractmethod
    def wait(self) -> Any:
        """Block until it is done; its result."""

    @abstractmethod
    async def wait_async(self) -> Any:
        """The same for an event loop, which is not blocked."""


Steps = Generator[Step, Any, Result]
"""A conversation with this result."""


@dataclass(frozen=True)
class Reply(Step):
    """What a future will hold; cancelled when it comes too late.

    Raises:
        TimeoutError: not within ``seconds``.
    """

    future: Future
    seconds: float

    def wait(self) -> Any:
        try:
            return self.future.result(max(self.seconds, 0))
        except TimeoutError:
            self.future.cancel()
            raise

    async def wait_async(self) -> Any:
        if self.future.done():
            return self.future.result()
        return await asyncio.wait_for(asyncio.wrap_future(self.future), max(self.seconds, 0))


@dataclass(frozen=True)
class Pause(Step):
    """Doing nothing for some seconds."""

    seconds: float

    def wait(self) -> None:
        time.sleep(self.seconds)

    async def wait_async(self) -> None:
        await asyncio.sleep(self.seconds)


@dataclass(frozen=True)
class Work(Step):
    """A call that computes or blocks; an event loop hands it to a thread."""

    function: Callable[[], Any]
    in_this_thread: Callable[[], Any] | None = None
    """In its place where a thread waits anyway; may block for longer."""

    def wait(self) -> Any:
        return (self.in_this_thread or self.function)()

    async def wait_async(self) -> Any:
        return await asyncio.to_thread(self.function)


def run(steps: Steps[Result]) -> Result:
    """Drive a conversation in this thread; its result or its error."""
    try:
        step = next(steps)
        while True:
            try:
                result = step.wait()
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as done:
        return done.value
    finally:
        steps.close()  # an interrupt ends it too


async def run_async(steps: Steps[Result]) -> Result:
    """Drive a conversation in the event loop; its result or its error."""
    try:
        step = next(steps)
        while True:
            try:
                result = await step.wait_async()
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as done:
        return done.value
    finally:
        steps.close()  # a cancelled task ends it too
