"""rekd-query: texts or images -> label, probability and the words or patches that decided."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rekd_train.command import application, examples, run

if TYPE_CHECKING:
    from rekd_deploy.client import Client
    from rekd_deploy.pipeline import Pipeline
    from rekd_deploy.text_source import SourcedText
    from rekd_train.prediction import Prediction

_URL = "localhost:8001"
_CHUNK = 256
"""Texts asked and printed together, so that a file of any size streams through."""

app = application(
    help="Ask a served model: label, probability, and the words or patches that decided.",
    epilog=examples(
        'rekd-query "A film of great warmth, badly lit."',
        "rekd-query --file reviews.jsonl --json > answers.jsonl",
        "rekd-query --file - --url http://localhost:8000 < reviews.txt",
        'rekd-query --local model_repository/python "No server needed."',
        "rekd-query --image shoe.png        # writes shoe.rationale.png and shoe.rationale.json, too",
    ),
)


@app.command()
def query(
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts to ask about.")] = None,
    file: Annotated[
        str | None,
        typer.Option(help='Texts of a file: .jsonl (key "text"), .txt (one a line), - (stdin).', metavar="FILE"),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image to ask a vision model about; may be repeated. Beside it, FILE.rationale.png and "
            "FILE.rationale.json are written (with --json: printed instead).",
            metavar="FILE",
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            help="Where the one --image with the patches that decided highlighted goes; the JSON beside it.",
            metavar="OUT",
        ),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, in order.")] = False,
    url: Annotated[
        str | None,
        typer.Option(help="Server: HOST:PORT (gRPC) or http://HOST:PORT.", show_default=_URL, metavar="URL"),
    ] = None,
    local: Annotated[
        Path | None,
        typer.Option(help="Answer in this process from a model repository, without a server.", metavar="REPO"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where --local answers: cpu, cuda or cuda:N.", show_default="cpu", metavar="DEVICE"),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a batch's answer may take.")] = 30.0,
) -> None:
    if sum((bool(texts), file is not None, bool(image))) != 1:
        raise typer.BadParameter("give texts, --file or --image, one of the three", param_hint="TEXT")
    if png is not None and (not image or len(image) != 1):
        raise typer.BadParameter("it shows one image; give exactly one --image", param_hint="--png")
    if url is not None and local is not None:
        raise typer.BadParameter("--local needs no server; give one of the two", param_hint="--url")
    if device is not None and local is None:
        raise typer.BadParameter("the server chooses its own; it goes with --local", param_hint="--device")
    if image:
        with _answerer(url or _URL, local, device or "cpu", timeout) as answerer:
            _ask_about_images(answerer, image, png, json_lines)
        return
    from rekd_deploy.text_source import texts_from_arguments, texts_from_file

    # arguments are checked at once; a file streams
    chunks = _chunks(list(texts_from_arguments(texts)) if texts else texts_from_file(file))
    first = next(chunks)  # bad input is found before a server is asked
    with _answerer(url or _URL, local, device or "cpu", timeout) as answerer:
        write = _write_json if json_lines else _writer()
        for chunk in chain([first], chunks):
            for prediction in _answers(answerer, chunk):
                write(prediction)


def _ask_about_images(answerer: Client | Pipeline, files: list[Path], png: Path | None, json_lines: bool) -> None:
    from rekd_deploy.render import plain_text
    from rekd_deploy.render_image import write_rationale
    from rekd_train.errors import InputError

    places = [png or file.with_name(f"{file.stem}.rationale.png") for file in dict.fromkeys(files)]
    if len(set(places)) < len(places):
        raise InputError(
            "the rationales of two images whose names differ in the ending alone would go to the same file; fix: "
            "ask about one at a time, with --png OUT"
        )
    for file, prediction in zip(files, answerer.predict(files), strict=True):
        place = png or file.with_name(f"{file.stem}.rationale.png")
        if png is not None or not json_lines:
            beside = write_rationale(file, prediction, place)
        if json_lines:
            _write_json(prediction, image=str(file))
        else:
            sys.stdout.write(f"{file}  {plain_text(prediction)}\nwritten: {place}, {beside}\n\n")


def _answerer(url: str, local: Path | None, device: str, timeout: float) -> Client | Pipeline:
    if local is not None:
        from rekd_deploy.pipeline import Pipeline

        return Pipeline(local, device=device)
    from rekd_deploy.client import Client

    return Client(url, timeout=timeout)


def _chunks(source: Iterable[SourcedText]) -> Iterator[list[SourcedText]]:
    """Lists of texts; those before a bad one come before its error."""
    from rekd_train.errors import InputError

    chunk: list[SourcedText] = []
    try:
        for sourced in source:
            chunk.append(sourced)
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
    except InputError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _answers(answerer: Client | Pipeline, chunk: list[SourcedText]) -> list[Prediction]:
    from rekd_train.errors import InputError

    try:
        return answerer.predict([sourced.text for sourced in chunk])
    except InputError as error:  # its number counts from the start of the chunk
        raise InputError(f"from {chunk[0].place} on: {error}") from None


def _write_json(prediction: Prediction, **more: str) -> None:
    plain_ascii = "utf" not in (sys.stdout.encoding or "").lower()
    sys.stdout.write(json.dumps({**more, **prediction.to_dict()}, ensure_ascii=plain_ascii) + "\n")


def _writer():
    from rich.console import Console

    from rekd_deploy.render import plain_text, shows_colours, terminal_text

    console = Console(highlight=False, markup=False, emoji=False)
    if shows_colours(console):
        return lambda prediction: console.print(terminal_text(prediction), end="\n\n")
    return lambda prediction: sys.stdout.write(plain_text(prediction) + "\n\n")


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
