"""What goes wrong, as RFC 9457 has it: application/problem+json with type, title, status and detail.

The type is a path of this server, ``/problems/NAME``, which tells what it means. ``detail`` is one sentence with
the value, the limit and the fix.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from starlette.responses import Response

from rekd_deploy import errors
from rekd_train.errors import FaultyItemsError, InputError, RekdError

MEDIA_TYPE = "application/problem+json"
_MOST_LISTED = 20


class Kind(NamedTuple):
    """A kind of problem."""

    status: int
    title: str


KINDS = {
    "malformed-request": Kind(400, "The request is no HTTP"),
    "malformed-body": Kind(400, "The body cannot be read"),
    "unauthorized": Kind(401, "The API key is missing or wrong"),
    "not-found": Kind(404, "There is nothing at this path"),
    "model-missing": Kind(404, "The model or its version is not served"),
    "method-not-allowed": Kind(405, "This path does not take this method"),
    "head-timeout": Kind(408, "The head of the request did not come in time"),
    "body-timeout": Kind(408, "The body did not come in time"),
    "body-too-large": Kind(413, "The body is larger than this server takes"),
    "unsupported-media-type": Kind(415, "The body is of a kind that this path does not take"),
    "invalid-request": Kind(422, "The body is not what this path takes"),
    "too-many-items": Kind(422, "More texts or images than one request may hold"),
    "item-too-large": Kind(422, "A text or image is larger than this server takes"),
    "unusable-items": Kind(422, "Some texts or images cannot be used"),
    "internal": Kind(500, "This server made a mistake"),
    "model-failed": Kind(502, "The model server gave no answer that can be used"),
    "overloaded": Kind(503, "There are too many requests"),
    "model-unavailable": Kind(503, "The model server does not answer"),
    "timeout": Kind(504, "There was no answer in time"),
    "http": Kind(400, "The request cannot be served"),
}
"""By the last part of the type."""
_OF_ERRORS: list[tuple[type[RekdError], str]] = [
    (InputError, "unusable-items"),
    (errors.ServerBusyError, "overloaded"),
    (errors.ServerUnavailableError, "model-unavailable"),
    (errors.DeadlineError, "timeout"),
    (errors.ModelMissingError, "model-missing"),
]


class Problem(Exception):
    """A request that is refused, or failed.

    Args:
        kind: a key of ``KINDS``.
        detail: what is wrong, the limit and the fix.
        headers: of the response.
        status: another one than the kind's.
        members: further members of the document, such as ``errors``.
    """

    def __init__(
        self, kind: str, detail: str, *,
        headers: dict[str, str] | None = None, status: int | None = None, **members: Any,
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.members = kind, detail, members
        self.status = status or KINDS[kind].status
        self.headers = dict(headers or {})
        if self.status == 503:
            self.headers.setdefault("Retry-After", "1")

    def response(self, request_id: str) -> Response:
        """The response to the request of that id."""
        document = {
            "type": f"/problems/{self.kind}", "title": KINDS[self.kind].title, "status": self.status,
            "detail": self.detail, "request_id": request_id, **self.members,
        }  # fmt: skip
        # ASCII: a detail may quote what is no valid Unicode
        return Response(json.dumps(document).encode(), self.status, self.headers, MEDIA_TYPE)


def problem_of(error: RekdError, address: str) -> Problem:
    """An error of the client as a problem; ``address``, Triton's, is nothing that other machines need to know."""
    kind = next((kind for cls, kind in _OF_ERRORS if isinstance(error, cls)), "model-failed")
    detail = str(error).replace(address, "Triton")
    members = {}
    if isinstance(error, FaultyItemsError):
        members["errors"] = [
            {"index": index, "detail": f"{fault.what}; fix: {fault.fix}"}
            for index, fault in list(error.faults.items())[:_MOST_LISTED]
        ]
    return Problem(kind, detail, **members)
