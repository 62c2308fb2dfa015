"""What every request passes: id, key, how many are on their way, what is counted, headers that keep browsers safe."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rekd_deploy.http.limits import Limits
from rekd_deploy.http.metrics import Metrics
from rekd_deploy.http.problems import Problem

LOG = logging.getLogger("rekd_deploy.http")
REQUEST_ID = "X-Request-ID"
_ID = re.compile(r"[!-~]{1,128}")
_OPEN = re.compile(r"/|/page\.js|/healthz|/openapi\.json|/docs(/.*)?|/problems/[a-z-]*")
"""What needs no key: probes, and pages that hold nothing but the project's own words."""
_OTHER = "other"
_CLIENT_GONE = 499
"""As nginx counts it."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Of responses that do not say otherwise."""


class Guard:
    """An ASGI middleware around the whole application.

    Args:
        routes: paths that are counted by name.
        key: what requests must carry; None: nothing.
    """

    def __init__(
        self, app: ASGIApp, *, routes: frozenset[str], limits: Limits, key: str | None, metrics: Metrics
    ) -> None:
        self._app, self._routes, self._limits, self._metrics = app, routes, limits, metrics
        self._key = None if key is None else key.encode()
        self._on_their_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; whatever fails is an answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, begun, status = Headers(scope=scope), time.monotonic(), 0
        given = headers.get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        route = scope["path"] if scope["path"] in self._routes else _OTHER

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                for name, value in (*_HEADERS.items(), (REQUEST_ID, request_id)):
                    own.setdefault(name, value)
            await send(message)

        self._on_their_way += 1
        self._metrics.in_flight.inc()
        try:
            self._check(scope, headers)
            await self._app(scope, receive, sent)
        except Problem as problem:
            self._metrics.failed(route, problem.kind)
            await problem.response(request_id)(scope, receive, sent)
        except ClientDisconnect:  # before its body was whole: there is nobody to answer, and nothing went wrong
            status = status or _CLIENT_GONE
        except Exception:
            LOG.exception("request %s: %s failed", request_id, route)
            if status:
                raise  # the answer has begun: uvicorn cuts the connection
            self._metrics.failed(route, "internal")
            problem = Problem("internal", f"the server's log says more under {request_id}; fix: report it")
            await problem.response(request_id)(scope, receive, sent)
        finally:
            self._on_their_way -= 1
            self._metrics.in_flight.dec()
            self._metrics.answered(route, scope["method"], status, time.monotonic() - begun)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise Problem if the request may not go on."""
        if self._key is not None and not _OPEN.fullmatch(scope["path"]):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._key):
                what = "the API key is wrong" if given else "the request has no API key"
                detail = f"{what}; fix: send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
                raise Problem("unauthorized", detail, headers={"WWW-Authenticate": 'Bearer realm="rekd"'})
        if scope["method"] == "POST" and self._on_their_way > self._limits.requests:
            what = f"{self._on_their_way:,} requests are on their way; at most {self._limits.requests:,} are taken"
            raise Problem("overloaded", f"{what} at once; fix: try later")
