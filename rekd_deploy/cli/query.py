"""rekd-query: texts or images -> label, probability and the words or patches that decided."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rekd_train.cli.command import FAILED, application, examples, finite, run

if TYPE_CHECKING:
    from rekd_deploy.client.client import Client
    from rekd_deploy.client.pipeline import Pipeline
    from rekd_deploy.contract.text_source import SourcedText, TextSource
    from rekd_train.inputs.prediction import Prediction

_URL = "localhost:8001"
_CHUNK = 256
"""Texts predicted and printed together, so that a file of any size streams through."""

app = application(
    help="Predictions of a served model: label, probability, and the words or patches that decided.",
    epilog=examples(
        'rekd-query "A warm and moving film with wonderful performances from the whole cast."',
        "rekd-query --file reviews.jsonl --json > answers.jsonl",
        "rekd-query --file reviews.csv --column review --json",
        "rekd-query --file - --url http://localhost:8000 < reviews.txt",
        'rekd-query --local model_repository/python "No server needed."',
        "rekd-query --image shoe.png --save pictures        # writes pictures/shoe.rationale.png and .json, too",
        "rekd-query --windows --file book.txt --url grpcs://triton.example:8001 --header 'Authorization: Bearer ...'",
    ),
)


@app.command()
def query(
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts to predict.")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help='Texts of a file: .jsonl (key "text"), .txt (one a line), a table (.csv, .tsv, .parquet), - (stdin: '
            "lines or JSON lines).",
            metavar="FILE",
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Column of a table or key of JSON lines that holds the texts.",
            show_default="text, else a table's only column of texts",
            metavar="NAME",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image for a vision model; may be repeated.",
            metavar="FILE",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write each --image with its label and the patches that decided as NAME.rationale.png there, and the "
            "answer as NAME.rationale.json; those of an earlier run are replaced.",
            metavar="DIR",
        ),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, in order.")] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help="Server: HOST:PORT (gRPC) or http://HOST:PORT; with TLS grpcs:// or https://.",
            show_default=_URL,
            metavar="URL",
        ),
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
    windows: Annotated[
        bool, typer.Option("--windows", help="Read long texts window by window instead of cutting them.")
    ] = False,
    header: Annotated[
        list[str] | None,
        typer.Option(help="Sent to the server with every request; may be repeated.", metavar="'NAME: VALUE'"),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", help="Root certificates to trust for grpcs:// and https:// (PEM).", metavar="FILE"),
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(help="The client's own certificate (PEM), where the server wants it.", metavar="FILE")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The private key of --cert (PEM).", metavar="FILE")] = None,
) -> None:
    remote = (url, *(header or ()), ca, cert, key)
    for is_wrong, what, option in (
        (bool(texts) + (file is not None) + bool(image) != 1, "give one of texts, --file and --image", "TEXT"),
        (save is not None and not image, "it saves pictures; it goes with --image", "--save"),
        (column is not None and file is None, "it names a column of a file; it goes with --file", "--column"),
        (device is not None and local is None, "the server chooses its own; it goes with --local", "--device"),
        (local is not None and any(remote), "no server is needed; leave --url, --header, --ca, --cert and --key out",
         "--local"),
        (windows and image, "windows are for texts; leave it out with --image", "--windows"),
    ):  # fmt: skip
        if is_wrong:
            raise typer.BadParameter(what, param_hint=option)
    options = {"timeout": timeout, "headers": _headers(header)}
    if ca or cert or key:
        from rekd_deploy.client.connection import TlsSettings

        options["tls"] = TlsSettings(ca, cert, key)
    if image:
        with _answerer(url or _URL, local, device or "cpu", options) as answerer:
            _check_kind(answerer, "image", url or _URL, local)
            _predict_images(answerer, image, save, json_lines)
        return
    from rekd_deploy.contract.text_source import TextSource

    source = TextSource(file, column, texts or (), lambda error: typer.echo(f"error: {error}", err=True))
    chunks = source.chunks(_CHUNK)
    first = next(chunks, None)  # bad input is found before a request is sent
    if first is None:  # all was left out
        raise typer.Exit(FAILED)
    with _answerer(url or _URL, local, device or "cpu", options) as answerer:
        _check_kind(answerer, "text", url or _URL, local)
        write = _write_json if json_lines else _writer()
        remaining = chain([first], chunks)
        for chunk in remaining:
            for sourced, prediction in _predicted(answerer, chunk, source, remaining, windows):
                write(prediction, sourced.record)
    if source.left_out:
        raise typer.Exit(FAILED)


def _check_kind(answerer: Client | Pipeline, given: str, url: str, local: Path | None) -> None:
    from rekd_train.errors import InputError

    kind = answerer.description.settings.kind
    if (kind, given) in (("text", "image"), ("image", "text")):
        fix = 'rekd-query "TEXT" or --file FILE' if kind == "text" else "rekd-query --image FILE"
        raise InputError(f"the model of {local or url} reads {kind}s, not {given}s; fix: {fix}")


def _predict_images(answerer: Client | Pipeline, files: list[Path], save: Path | None, json_lines: bool) -> None:
    from rekd_deploy.client.render import plain_text, rationale_files, write_rationale
    from rekd_train.errors import FaultyItemsError

    written = rationale_files(files, save) if save is not None else {}
    try:
        predictions = answerer.predict(files)
    except FaultyItemsError as error:
        raise FaultyItemsError(error.faults, lambda index: str(files[index])) from None
    for file, prediction in zip(files, predictions, strict=True):
        if file in written:
            write_rationale(file, prediction, written[file])
        if json_lines:
            _write_json(prediction, {"image": str(file)})
        else:
            saved = f"written: {written[file]}\n" if file in written else ""
            sys.stdout.write(f"{file}  {plain_text(prediction)}\n{saved}\n")


def _headers(given: list[str] | None) -> dict[str, str]:
    headers = {}
    for header in given or ():
        name, colon, value = header.partition(":")
        if not colon:
            raise typer.BadParameter(f"'{header}' has no colon; give 'NAME: VALUE'", param_hint="--header")
        headers[name.strip()] = value.strip()
    return headers


def _answerer(url: str, local: Path | None, device: str, options: dict[str, Any]) -> Client | Pipeline:
    if local is not None:
        from rekd_deploy.client.pipeline import Pipeline

        return Pipeline(local, device=device)
    from rekd_deploy.client.client import Client

    return Client(url, **options)


def _predicted(
    answerer: Client | Pipeline,
    chunk: list[SourcedText],
    source: TextSource,
    remaining: Iterator[list[SourcedText]],
    windows: bool,
) -> list[tuple[SourcedText, Prediction]]:
    """The texts of a chunk, but those that are left out, and their predictions."""
    from rekd_train.errors import FaultyItemsError

    if not chunk:
        return []
    try:
        predictions = answerer.predict([sourced.text for sourced in chunk], windows=windows)
        return list(zip(chunk, predictions, strict=True))
    except FaultyItemsError as error:  # its numbers are those of the chunk
        faults = {chunk[index].number: fault for index, fault in error.faults.items()}
    if source.leaves_out(faults):
        usable = [sourced for sourced in chunk if sourced.number not in faults]
        return _predicted(answerer, usable, source, remaining, windows)
    try:
        for _ in remaining:  # what else is wrong in the file is said at once
            pass
    except FaultyItemsError as error:
        faults |= error.faults
    raise source.refusal(faults)


def _write_json(prediction: Prediction, record: Mapping[str, Any]) -> None:
    """One line: the record's keys, then the answer's; a key that both have is the record's as ``input_KEY``."""
    answer = prediction.to_dict()
    own = {key: value for key, value in record.items() if key not in answer}
    for key in (key for key in record if key in answer):
        name = f"input_{key}"
        while name in own:  # answers of an earlier run have such a key already
            name = f"input_{name}"
        own[name] = record[key]
    plain_ascii = "utf" not in (sys.stdout.encoding or "").lower()
    sys.stdout.write(json.dumps(finite({**own, **answer}), ensure_ascii=plain_ascii, default=str) + "\n")


def _writer() -> Callable[[Prediction, Mapping[str, Any]], Any]:
    from rich.console import Console

    from rekd_deploy.client.render import plain_text, shows_colours, terminal_text

    console = Console(highlight=False, markup=False, emoji=False)
    if shows_colours(console):
        return lambda prediction, _: console.print(terminal_text(prediction), end="\n\n")
    return lambda prediction, _: sys.stdout.write(plain_text(prediction) + "\n\n")


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
