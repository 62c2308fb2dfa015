"""The page that shows answers, and the one that shows the interface; both load nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

_PAGE = Path(__file__).parent / "page"
_SWAGGER = Path(fastapi_offline.__file__).parent / "static"
"""Swagger UI's files, of a package that brings them along."""
_REFRESH = {"Cache-Control": "no-cache"}


def add_pages(app: FastAPI) -> None:
    """Serve ``/``, its script, ``/docs`` and its files."""
    html, script = ((_PAGE / name).read_bytes() for name in ("index.html", "page.js"))
    style = re.search(rb"<style>(.*?)</style>", html, re.DOTALL)
    policy = (
        f"default-src 'none'; script-src 'self'; style-src '{_hash(style[1] if style else b'')}'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    page = {"Content-Security-Policy": policy, **_REFRESH}
    docs = get_swagger_ui_html(
        openapi_url="openapi.json", title="REKD: the HTTP interface", swagger_js_url="docs/files/swagger-ui-bundle.js",
        swagger_css_url="docs/files/swagger-ui.css", swagger_favicon_url="data:,",
        swagger_ui_parameters={"defaultModelsExpandDepth": -1, "tryItOutEnabled": True},
    )  # fmt: skip
    inline = re.search(rb"<script>(.*?)</script>", docs.body, re.DOTALL)
    docs_policy = (  # Swagger UI writes styles into its elements
        f"default-src 'none'; script-src 'self' '{_hash(inline[1] if inline else b'')}'; style-src 'self' "
        "'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    )

    async def show_page(request: Request) -> Response:
        return Response(html, headers=page, media_type="text/html")

    async def show_script(request: Request) -> Response:
        return Response(script, headers=_REFRESH, media_type="text/javascript")

    async def show_docs(request: Request) -> Response:
        return Response(docs.body, headers={"Content-Security-Policy": docs_policy}, media_type="text/html")

    for path, endpoint in (("/", show_page), ("/page.js", show_script), ("/docs", show_docs)):
        app.add_route(path, endpoint, methods=["GET"], include_in_schema=False)
    app.mount("/docs/files", StaticFiles(directory=_SWAGGER))


def _hash(content: bytes) -> str:
    """What a Content-Security-Policy calls an inline script or style that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}"
