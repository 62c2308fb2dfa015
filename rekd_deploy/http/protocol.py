"""uvicorn's HTTP, where what is no HTTP is refused with a problem, and a head that does not come is not waited for."""

from __future__ import annotations

import asyncio
import secrets
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rekd_deploy.http.guard import REQUEST_ID
from rekd_deploy.http.problems import Problem

_LINGER_SECONDS = 2.0
"""Who is cut off while sending never reads the answer: so long it is read on, and thrown away."""


class Protocol(H11Protocol):
    """A connection.

    Args:
        head_seconds: that a request's head may take from its first byte, and the first byte of a connection.
    """

    def __init__(self, *given: Any, head_seconds: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self._head_seconds = head_seconds
        self._waiting: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_longer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP; called where h11's error is handled."""
        error = sys.exception()
        hint = getattr(error, "error_status_hint", 400)
        detail = f"this is no HTTP/1.1 request: {ascii(str(error or msg)[:200])}"
        fix = "fix: let your library, or curl, write it"
        self._refuse(Problem("malformed-request", f"{detail}; {fix}", status=hint if 400 <= hint < 500 else None))

    def _look(self) -> None:
        """Wait for a head that has begun, and no longer once it is whole."""
        if self._refused:
            return
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._wait_no_longer()
        elif self._waiting is None and self.conn.trailing_data[0]:
            self._wait()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(self._head_seconds, self._too_late)

    def _wait_no_longer(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _too_late(self) -> None:
        begun = self.conn.trailing_data[0]
        if begun:
            detail = f"{len(begun):,} bytes of a request's head came within {self._head_seconds:g} s, and not its end"
            self._refuse(Problem("head-timeout", f"{detail}; fix: send it at once"))
        else:
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answer, if no answer has begun, and close."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # its application has nobody to answer
            self.cycle.message_event.set()
        self._refused = True
        self._wait_no_longer()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = problem.response(request_id := secrets.token_hex(8))
            headers = [*response.raw_headers, (REQUEST_ID.encode(), request_id.encode()), (b"Connection", b"close")]
            head = h11.Response(status_code=response.status_code, headers=headers)
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._waiting = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
