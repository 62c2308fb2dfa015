"""The application: routes over a running Triton server.

    uvicorn --factory rekd_deploy.http.app:create_app     # REKD_TRITON_URL says where Triton is

``rekd-serve --http PORT`` runs it in front of the server that it starts, with ``--url`` before another one.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rekd_deploy.client.transport import Transport
from rekd_deploy.http.guard import LOG, Guard
from rekd_deploy.http.limits import URL, Limits, api_key
from rekd_deploy.http.metrics import Metrics
from rekd_deploy.http.pages import add_pages
from rekd_deploy.http.problems import Problem, problem_of
from rekd_deploy.http.routes import make_routes
from rekd_deploy.http.served import Served
from rekd_train import __version__
from rekd_train.errors import RekdError


def create_app(
    server_url: str | None = None, limits: Limits | None = None, *,
    environment: Mapping[str, str] = os.environ, transport: Transport | None = None, beside: Sequence[str] = (),
) -> FastAPI:  # fmt: skip
    """The ASGI application.

    Args:
        server_url: of Triton, see ``Client``; None: ``REKD_TRITON_URL``, or localhost:8001.
        limits: of requests; None: those of ``REKD_HTTP_LIMITS``.
        environment: where ``REKD_API_KEY`` is, and the other two.
        transport: what speaks to Triton, instead of what ``server_url`` names.
        beside: names of further models there.

    Raises:
        ConfigError: a limit or the key cannot be used.
        ClientError: the address is none.
    """
    limits = limits or Limits.of_environment(environment)
    server_url = server_url or environment.get(URL) or "localhost:8001"
    served = Served(server_url, limits.seconds, transport, beside)
    counted = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await served.close()

    app = FastAPI(
        title="REKD", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
        description="Classifiers that say why: a label, and the words or patches that it was made from.",
    )  # fmt: skip
    app.include_router(make_routes(served, limits, counted))
    add_pages(app)
    _add_handlers(app, served)
    routes = frozenset({"/", "/page.js", "/docs", *app.openapi()["paths"]})
    app.add_middleware(Guard, routes=routes, limits=limits, key=api_key(environment), metrics=counted)
    return app


def _add_handlers(app: FastAPI, served: Served) -> None:
    """Every failure is a problem; the guard answers with it."""

    async def of_ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, RekdError)
        problem = problem_of(error, served.url)
        if problem.status >= 500:
            LOG.warning("request %s: %s", request.state.request_id, error)
        raise problem from None

    async def of_starlette(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, headers = ascii(request.url.path[:120]), dict(error.headers or {})
        if error.status_code == 404:
            raise Problem("not-found", f"{path} is no path of this server; fix: /docs lists them") from None
        if error.status_code == 405:
            what = f"{path} does not take {request.method[:20]}; fix: {headers.get('Allow', 'see /docs')}"
            raise Problem("method-not-allowed", what, headers=headers) from None
        raise Problem("http", str(error.detail)[:200], status=error.status_code, headers=headers) from None

    app.add_exception_handler(RekdError, of_ours)
    app.add_exception_handler(HTTPException, of_starlette)
