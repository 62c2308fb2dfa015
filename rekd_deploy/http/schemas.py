"""What the routes take and give, as pydantic models; the OpenAPI document is made from them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Wanted(BaseModel):
    """What is asked of which model."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = Field(default=None, max_length=64, description="rekd, or another that /v1/models names.")
    version: str | None = Field(default=None, pattern="^[0-9]{1,18}$", description="Of the model; null: the newest.")
    windows: bool = Field(
        default=False, description="Read a text beyond the model's length window by window, instead of cutting it."
    )


class PredictRequest(Wanted):
    """Texts to predict."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"texts": ["A warm and moving film."]}]}
    )
    texts: list[str] = Field(min_length=1, description="Each with at least one word.")


class HuggingFaceParameters(BaseModel):
    """Those of a text-classification request."""

    model_config = ConfigDict(extra="forbid")
    top_k: int | None = Field(default=None, ge=1, description="Most classes of each answer; null: all.")
    function_to_apply: Literal["softmax"] | None = Field(default=None, description="As the model was trained.")


class HuggingFaceRequest(BaseModel):
    """What Hugging Face's text-classification takes."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"inputs": "A warm and moving film."}]}
    )
    inputs: str | list[str] = Field(description="One text, or several.")
    parameters: HuggingFaceParameters | None = None
    options: dict[str, Any] | None = Field(default=None, description="Taken, and of no effect.")


class SpanOut(BaseModel):
    """Neighbouring whole words that were kept."""

    start: int = Field(description="First character, counted in Unicode code points.")
    end: int = Field(description="One past the last.")
    text: str
    score: float = Field(description="The selector's; higher: more wanted.")


class Box(BaseModel):
    """A patch that was kept: pixels of the image as given, upright, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int
    row: int
    column: int
    score: float = Field(description="The selector's; higher: more wanted.")


class _Answer(BaseModel):
    label: str
    probability: float = Field(description="Of the label.")
    probabilities: dict[str, float] = Field(description="Of each class, calibrated.")
    rate: float = Field(description="Share of the words, or patches, that the model has read.")
    truncated: bool = Field(description="Whether the text was longer than the model reads, and its end cut.")
    doubt: float | None = Field(
        description="Share of the usual texts whose words are more usual, 0..1; null: an image, or not known."
    )


class TextAnswer(_Answer):
    """The answer to a text."""

    spans: list[SpanOut]


class ImageAnswer(_Answer):
    """The answer to an image."""

    boxes: list[Box]


class PredictResponse(BaseModel):
    """One answer a text or image, in their order."""

    model: str
    version: str = Field(description="The version of the model that answered.")
    request_id: str
    answers: list[TextAnswer] | list[ImageAnswer]


class ScoredLabel(BaseModel):
    """A class, as Hugging Face's text-classification gives it, and the words that all scores were made from."""

    label: str
    score: float
    spans: list[SpanOut]


class ModelOut(BaseModel):
    """A served model."""

    name: str
    versions: list[str] = Field(description="The newest first.")
    kind: str = Field(description="text or image.")
    labels: list[str]
    budget: float | None = Field(
        description="Largest share of the words or patches that it keeps; of short inputs it keeps a few in any case. "
        "null: no limit, or not known."
    )


class ModelsResponse(BaseModel):
    """What is served, and what a request may hold."""

    models: list[ModelOut]
    limits: dict[str, float]


class ProblemOut(BaseModel):
    """RFC 9457: what went wrong."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What is wrong, the limit and the fix.")
    request_id: str
    errors: list[dict[str, Any]] = Field(default=[], description="One by one, where there are several.")


SCORED = TypeAdapter(list[list[ScoredLabel]])
