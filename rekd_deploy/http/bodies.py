"""The bodies of requests: read within the limits, as JSON or as files. torch-free."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from email.message import Message
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from rekd_deploy.http.limits import Limits
from rekd_deploy.http.problems import Problem

if TYPE_CHECKING:
    from PIL.Image import Image

JSON, FORM = "application/json", "multipart/form-data"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's other readers are for files that nobody sends here, and some start programs."""
_MOST_LISTED = 20
Body = TypeVar("Body", bound=BaseModel)


def media_type(request: Request, *taken: str) -> str:
    """That of the request; Problem: it is none of ``taken``, or the body is compressed."""
    header = Message()
    header["Content-Type"] = request.headers.get("content-type", "")
    found = header.get_content_type() if request.headers.get("content-type") else ""
    wanted = " or ".join(taken)
    if found not in taken:
        what = f"the Content-Type is {found[:80]}" if found else "there is no Content-Type"
        headers = {"Accept-Post": ", ".join(taken)}
        raise Problem("unsupported-media-type", f"{what}; it must be {wanted}", headers=headers)
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise Problem("unsupported-media-type", f"the Content-Encoding is {coding[:40]}; fix: send the body as it is")
    return found


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body; Problem: it is larger than ``limits.bytes``, or takes longer than ``limits.seconds``."""
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.bytes:
                    chunks.append(chunk)
                else:  # read on and thrown away: who is cut off while sending never reads the answer
                    chunks.clear()
    except TimeoutError:
        what = f"{size:,} bytes of the body came within {limits.seconds:g} s, and not its end"
        headers = {"Connection": "close"}
        raise Problem("body-timeout", f"{what}; fix: send it at once, or less of it", headers=headers) from None
    if size > limits.bytes:
        detail = f"the body has {size:,} bytes; at most {limits.bytes:,} are taken; fix: several requests"
        raise Problem("body-too-large", detail, headers={"Connection": "close"})
    return b"".join(chunks)


def parsed(model: type[Body], body: bytes | dict[str, str]) -> Body:
    """A JSON body, or the fields of a form; Problem: it is no JSON, or not what ``model`` says."""
    try:
        return model.model_validate(body) if isinstance(body, dict) else model.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        reason = found[0]["msg"].removeprefix("Invalid JSON: ")
        raise Problem("malformed-body", f"the body is no JSON: {reason}; fix: send JSON in UTF-8")
    listed = [
        {"pointer": "".join(f"/{part}" for part in each["loc"])[:200], "detail": each["msg"]}
        for each in found[:_MOST_LISTED]
    ]
    shown = "; ".join(f"{each['pointer'] or 'the body'}: {each['detail']}" for each in listed)
    more = f"; and {len(found) - len(listed):,} more" if len(found) > len(listed) else ""
    raise Problem("invalid-request", f"{shown}{more}; fix: see /docs for what this path takes", errors=listed)


def check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Raise Problem if there are too many texts, or one is too long."""
    if len(texts) > limits.texts:
        detail = f"the request has {len(texts):,} texts; at most {limits.texts:,} are taken; fix: several requests"
        raise Problem("too-many-items", detail)
    for number, text in enumerate(texts, 1):
        if len(text) > limits.characters:
            detail = f"text {number} has {len(text):,} characters; at most {limits.characters:,} are taken; fix: cut it"
            raise Problem("item-too-large", detail)


async def read_form(request: Request, body: bytes, limits: Limits) -> tuple[list[bytes], dict[str, str]]:
    """Files, in their order, and the other fields; Problem: the form is malformed, or holds too many files."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers, stream(), max_files=limits.images + 1, max_fields=8, max_part_size=64 << 10
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, LookupError) as error:  # the last two: of its headers
        if "Too many files" in str(error):
            raise _too_many(f"more than {limits.images:,}", limits) from None
        reason = getattr(error, "message", None) or str(error)
        detail = f"the form cannot be read: {reason[:200]}; fix: let your library, or curl -F, write it"
        raise Problem("malformed-body", detail) from None
    files, fields = [], {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.append(await value.read())
        else:
            fields[name] = value
    await form.close()
    for file in getattr(parser, "_files_to_close_on_error", ()):  # of a part without an end, which is no error to it
        file.close()
    if len(files) > limits.images:
        raise _too_many(f"{len(files):,}", limits)
    if not files:
        raise Problem("invalid-request", "the form holds no file; fix: give at least one image (curl -F image=@x.png)")
    return files, fields


def _too_many(count: str, limits: Limits) -> Problem:
    detail = f"the request has {count} images; at most {limits.images:,} are taken; fix: several requests"
    return Problem("too-many-items", detail)


def decoded(files: Sequence[bytes], limits: Limits) -> list[Image]:
    """Images, each read whole; Problem: one cannot be read, or together they have too many pixels. Takes its time."""
    from PIL import Image

    images, pixels = [], 0
    for number, content in enumerate(files, 1):
        try:
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
            pixels += image.width * image.height
            if pixels <= limits.pixels:  # before anything is decoded
                image.load()
        except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
            reason = f"image {number} cannot be read as an image ({type(error).__name__})"
            detail = f"{reason}; fix: a PNG, JPEG, WebP, GIF, BMP or TIFF file"
            raise Problem("unusable-items", detail, errors=[{"index": number - 1, "detail": detail}]) from None
        if pixels > limits.pixels:
            detail = f"the first {number} images have {pixels:,} pixels together; at most {limits.pixels:,} are taken"
            raise Problem("item-too-large", f"{detail}; fix: smaller images, or several requests")
        images.append(image)
    return images
