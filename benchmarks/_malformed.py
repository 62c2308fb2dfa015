"""Malformed requests: bytes on a socket, what has to come back, and what did."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

REFUSED = "refused"
"""It must be answered with 4xx and a reason."""
ANSWERED = "answered"
"""It must have an answer, 2xx or 4xx: whether it is right is for the server to say, as after a chance change."""
CUT = "cut"
"""It has no end, so it may also have no answer; the connection must be closed."""
CHANCE = "chance"
"""Nobody knows what it is: an answer, a refusal, or a closed connection."""
_PATIENCE = 20.0
"""Seconds after which a request hangs."""


class Case(NamedTuple):
    """A request that is sent as it is."""

    kind: str
    parts: Sequence[bytes | float]
    """What is sent; a number is a pause in seconds."""
    expected: str
    half_closed: bool = False
    """Whether it is said that nothing more comes."""


class Outcome(NamedTuple):
    """What came back."""

    kind: str
    status: int | None
    """None: the connection was closed without an answer."""
    seconds: float
    fault: str
    """What is wrong with it; empty: nothing."""


def exchange(address: tuple[str, int], case: Case) -> Outcome:
    """Send a case, read until the server closes, and judge."""
    begun, answer, hung = time.monotonic(), b"", False
    with socket.create_connection(address, timeout=_PATIENCE) as connection:
        try:
            for part in case.parts:
                if isinstance(part, bytes):
                    connection.sendall(part)
                else:
                    time.sleep(part)
            if case.half_closed:
                connection.shutdown(socket.SHUT_WR)
        except OSError:  # it has closed already: its answer is there
            pass
        try:
            while not (case.expected != CUT and _is_whole(answer)) and (chunk := connection.recv(1 << 16)):
                answer += chunk
        except TimeoutError:
            hung = True
        except OSError:
            pass
    seconds = time.monotonic() - begun
    status, fault = _judged(case, answer)
    return Outcome(case.kind, status, round(seconds, 3), "it hangs" if hung else fault)


def fault_of(status: int, media_type: str, content: bytes, expected: str) -> str:
    """What is wrong with an answer; empty: nothing."""
    if 200 <= status < 300:
        return "it was not refused" if expected == REFUSED else ""
    if not 400 <= status < 500:
        return f"status {status}: {content[:200]!r}"
    if not media_type.startswith("application/problem+json"):
        return f"status {status} with {media_type or 'no type'}, no problem details: {content[:200]!r}"
    with suppress(ValueError):
        document = json.loads(content)
        if document["status"] == status and document["detail"] and document["type"].startswith("/problems/"):
            return ""
    return f"problem details that say nothing: {content[:200]!r}"


def _parted(answer: bytes) -> tuple[int | None, dict[str, str], bytes]:
    """Status, headers and the rest of an answer; None: its head is not whole."""
    while answer.startswith(b"HTTP/1.1 1"):  # such as 100 Continue
        answer = answer.partition(b"\r\n\r\n")[2]
    head, end, content = answer.partition(b"\r\n\r\n")
    if not end:
        return None, {}, b""
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, content


def _is_whole(answer: bytes) -> bool:
    status, headers, content = _parted(answer)
    return status is not None and len(content) >= int(headers.get("content-length", 1 << 40))


def _judged(case: Case, answer: bytes) -> tuple[int | None, str]:
    status, headers, content = _parted(answer)
    if status is None:
        return None, "" if case.expected in (CUT, CHANCE) else "no answer"
    first = content[: int(headers.get("content-length", len(content)))]  # the rest was read as another request
    return status, fault_of(status, headers.get("content-type", ""), first, case.expected)
