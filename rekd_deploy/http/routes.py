"""The routes: what is asked of Triton, and how its answers are written. torch-free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import Request
from starlette.responses import Response

from rekd_deploy.errors import ClientError, ModelMissingError
from rekd_deploy.http import bodies, problems, schemas
from rekd_deploy.http.limits import Limits
from rekd_deploy.http.metrics import MEDIA_TYPE, Metrics
from rekd_deploy.http.problems import Problem
from rekd_deploy.http.served import Served
from rekd_deploy.repository.config import ENSEMBLE
from rekd_train.inputs.prediction import Prediction

_VERSION_HEADER = "X-Model-Version"
_FRESH_SECONDS = 10.0
"""Triton that has answered a request this lately is healthy without being asked: while it loads a model it answers
requests, and nothing else."""
_PROBLEM = {problems.MEDIA_TYPE: {"schema": schemas.ProblemOut.model_json_schema()}}
_FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"content": _PROBLEM, "description": "The request is refused; the detail says what to change."},
    "5XX": {"content": _PROBLEM, "description": "There is no answer; the detail says whether to try again."},
}
_KEYS = [Security(HTTPBearer(auto_error=False)), Security(APIKeyHeader(name="X-API-Key", auto_error=False))]
"""What the document says of the key; the guard checks it."""


def make_routes(served: Served, limits: Limits, counted: Metrics) -> APIRouter:
    """All that is answered in JSON, and the metrics."""
    router = APIRouter()
    answered_at = -_FRESH_SECONDS

    async def predict(request: Request, items: Sequence[Any], kind: str, **options: Any) -> Any:
        nonlocal answered_at
        found = await served.predict(items, kind, request_id=request.state.request_id, **options)
        answered_at = time.monotonic()
        counted.items(kind, len(found))
        return found

    @router.post("/v1/predict", dependencies=_KEYS, openapi_extra=_body("predict", schemas.PredictRequest, files=True),
                 responses=_ok(schemas.PredictResponse))  # fmt: skip
    async def predict_texts_or_images(request: Request) -> Response:
        """Label, probabilities, and the words or patches that decided, of each text or image."""
        items: Sequence[Any]
        wanted: schemas.Wanted
        if bodies.media_type(request, bodies.JSON, bodies.FORM) == bodies.JSON:
            wanted = body = bodies.parsed(schemas.PredictRequest, await bodies.read_body(request, limits))
            items, kind = body.texts, "text"
            bodies.check_texts(items, limits)
        else:
            files, fields = await bodies.read_form(request, await bodies.read_body(request, limits), limits)
            wanted = bodies.parsed(schemas.Wanted, fields)
            items, kind = await asyncio.to_thread(bodies.decoded, files, limits), "image"
        name = wanted.model or ENSEMBLE
        found = await predict(
            request, items, kind, model=name, version=wanted.version or "", windows=wanted.windows
        )  # fmt: skip
        answers: Any = [_text_answer(each) if kind == "text" else _image_answer(each) for each in found]
        return _json(
            schemas.PredictResponse(
                model=name, version=found.version, request_id=request.state.request_id, answers=answers
            ).model_dump_json(), found.version,
        )  # fmt: skip

    @router.post("/v1/huggingface", dependencies=_KEYS, openapi_extra=_body("huggingface", schemas.HuggingFaceRequest),
                 responses=_ok(list[list[schemas.ScoredLabel]]))  # fmt: skip
    async def text_classification(request: Request) -> Response:
        """Texts in and scores out as Hugging Face's text-classification has them, the most probable class first."""
        bodies.media_type(request, bodies.JSON)
        wanted = bodies.parsed(schemas.HuggingFaceRequest, await bodies.read_body(request, limits))
        texts = [wanted.inputs] if isinstance(wanted.inputs, str) else wanted.inputs
        bodies.check_texts(texts, limits)
        parameters = wanted.parameters or schemas.HuggingFaceParameters()
        found = await predict(request, texts, "text", model=ENSEMBLE)
        answers = [_scored(each)[: parameters.top_k] for each in found]
        return _json(schemas.SCORED.dump_json(answers), found.version)

    @router.get("/v1/models", dependencies=_KEYS, responses=_ok(schemas.ModelsResponse))
    async def models() -> Response:
        """The models that are served, their versions and classes; and the limits of a request."""
        found = []
        for name in served.models:
            try:
                versions = await served.versions(name)
                description = await served.description(name, versions[0]) if versions else None
            except ModelMissingError:
                continue
            if description is not None:
                found.append(schemas.ModelOut(
                    name=name, versions=versions, kind=description.settings.kind, labels=list(description.labels),
                    budget=description.budget,
                ))  # fmt: skip
        return _json(schemas.ModelsResponse(models=found, limits=asdict(limits)).model_dump_json())

    @router.get("/healthz", responses={200: {"description": "Triton answers, and serves the model."}})
    async def healthz() -> Response:
        """Whether requests are answered: 200, or a problem of status 503. Takes no key."""
        if time.monotonic() - answered_at > _FRESH_SECONDS:
            try:
                ready = bool(await served.versions())
            except ClientError as error:
                detail = str(error).replace(served.url, "Triton")
                raise Problem("model-unavailable", detail) from None
            if not ready:
                detail = f"Triton has no version of '{ENSEMBLE}' ready; fix: wait, or see its log"
                raise Problem("model-unavailable", detail)
        return _json('{"status":"ready"}')

    @router.get("/metrics", dependencies=_KEYS, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Requests, failures and latencies of this server, for Prometheus."""
        return Response(counted.text(), headers={"Content-Type": MEDIA_TYPE})

    @router.get("/problems/{name}", responses={"4XX": _FAILURES["4XX"]})
    async def problem(name: str) -> Response:
        """What the type of a problem means."""
        if name not in problems.KINDS:
            known = ", ".join(problems.KINDS)
            raise Problem("not-found", f"{ascii(name[:80])} is no problem of this server; fix: one of {known}")
        kind = problems.KINDS[name]
        return _json(f'{{"type":"/problems/{name}","title":"{kind.title}","status":{kind.status}}}')

    return router


def _text_answer(found: Prediction) -> schemas.TextAnswer:
    return schemas.TextAnswer(**_common(found), spans=_spans(found))


def _image_answer(found: Prediction) -> schemas.ImageAnswer:
    sides = ("left", "top", "right", "bottom")
    boxes: list[Any] = [
        dict(zip(sides, patch.box, strict=True), row=patch.row, column=patch.column, score=patch.score)
        for patch in found.rationale
    ]
    return schemas.ImageAnswer(**_common(found), boxes=boxes)


def _common(found: Prediction) -> dict[str, Any]:
    names = ("label", "probability", "probabilities", "rate", "truncated", "doubt")
    return {name: getattr(found, name) for name in names}


def _spans(found: Prediction) -> list[Any]:
    return [asdict(span) for span in found.rationale]


def _scored(found: Prediction) -> list[schemas.ScoredLabel]:
    ranked = sorted(found.probabilities.items(), key=lambda item: -item[1])
    return [schemas.ScoredLabel(label=label, score=score, spans=_spans(found)) for label, score in ranked]


def _json(content: str | bytes, version: str = "") -> Response:
    return Response(content, headers={_VERSION_HEADER: version} if version else None, media_type=bodies.JSON)


def _ok(model: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}, **_FAILURES}


def _body(route: str, model: Any, files: bool = False) -> dict[str, Any]:
    """What the OpenAPI document says of a body that the route reads itself, within the limits."""
    place = f"#/paths/~1v1~1{route}/post/requestBody/content/application~1json/schema/$defs/{{model}}"
    content: dict[str, Any] = {bodies.JSON: {"schema": model.model_json_schema(ref_template=place)}}
    if files:
        file = {"type": "array", "items": {"type": "string", "format": "binary"}}
        text = {name: {"type": "string"} for name in ("model", "version")}
        content[bodies.FORM] = {"schema": {"type": "object", "properties": {"image": file, **text}}}
    return {"requestBody": {"required": True, "content": content}}
