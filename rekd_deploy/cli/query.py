"""rekd-query: texts or images -> label, probability and the words or patches that decided."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rekd_deploy.repository.config import ENSEMBLE
from rekd_train.cli.command import FAILED, application, examples, finite, run

if TYPE_CHECKING:
    from rekd_deploy.client.client import Client
    from rekd_deploy.client.pipeline import Pipeline
    from rekd_deploy.contract.text_source import SourcedText, TextSource
    from rekd_train.inputs.prediction import Prediction

_URL = "localhost:8001"
_CPU = "cpu"
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
    file: Annotated[str | None, typer.Option(
        help='.jsonl (key "text"), .txt (a text a line), a table (.csv, .tsv, .parquet), - (stdin: lines or JSON).',
        metavar="FILE"
    )] = None,
    column: Annotated[str | None, typer.Option(
        help="Column of a table or key of JSON lines that holds the texts; else text, or the only one of texts.",
        metavar="NAME"
    )] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image to predict; may be repeated.", metavar="FILE")] = None,
    save: Annotated[Path | None, typer.Option(
        help="Write what decided of each --image there, NAME.rationale.png and .json; earlier ones are replaced.",
        metavar="DIR"
    )] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, in order.")] = False,
    url: Annotated[
        str, typer.Option(help="HOST:PORT (gRPC) or http://HOST:PORT; with TLS grpcs:// or https://.", metavar="URL")
    ] = _URL,
    model: Annotated[
        str, typer.Option(help="Another model there, such as what rekd-serve --beside serves.", metavar="NAME")
    ] = ENSEMBLE,
    local: Annotated[
        Path | None, typer.Option(help="Model repository to predict with in this process, no server.", metavar="REPO")
    ] = None,
    device: Annotated[str, typer.Option(help="Where --local predicts: cpu, cuda or cuda:N.", metavar="DEVICE")] = _CPU,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds the response to a batch may take.")] = 30.0,
    windows: Annotated[
        bool, typer.Option("--windows", help="Read long texts window by window instead of cutting them.")
    ] = False,
    header: Annotated[
        list[str] | None, typer.Option(help="Sent with every request; may be repeated.", metavar="'NAME: VALUE'")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="Root certificates to trust, for TLS (PEM).", metavar="FILE")] = None,
    cert: Annotated[Path | None, typer.Option(help="The client's own certificate (PEM).", metavar="FILE")] = None,
    key: Annotated[Path | None, typer.Option(help="The private key of --cert (PEM).", metavar="FILE")] = None,
) -> None:
    remote = (url != _URL, model != ENSEMBLE, header, ca, cert, key)
    for is_wrong, what, option in (
        (bool(texts) + (file is not None) + bool(image) != 1, "give one of texts, --file and --image", "TEXT"),
        (save is not None and not image, "it saves pictures; it goes with --image", "--save"),
        (column is not None and file is None, "it names a column of a file; it goes with --file", "--column"),
        (device != _CPU and local is None, "the server chooses its own; it goes with --local", "--device"),
        (local is not None and any(remote),
         "no server is needed; leave --url, --model, --header, --ca, --cert and --key out", "--local"),
        (windows and image, "windows are for texts; leave it out with --image", "--windows"),
        (any(":" not in each for each in header or ()), "one has no colon; give 'NAME: VALUE'", "--header"),
    ):  # fmt: skip
        if is_wrong:
            raise typer.BadParameter(what, param_hint=option)
    from rekd_deploy.contract.text_source import TextSource

    chunks: Iterator[list[SourcedText]] = iter(())
    if not image:
        source = TextSource(file, column, texts or (), lambda error: typer.echo(f"error: {error}", err=True))
        chunks = source.chunks(_CHUNK)
        first = next(chunks, None)  # bad input is found before a request is sent
        if first is None:  # all was left out
            raise typer.Exit(FAILED)
        chunks = chain([first], chunks)
    with _opened(url, model, local, device, timeout, header or [], (ca, cert, key)) as predictor:
        _check_kind(predictor, "image" if image else "text", local or url)
        if image:
            _predict_images(predictor, image, save, json_lines)
            return
        write = _write_json if json_lines else _writer()
        for chunk in chunks:
            for sourced, prediction in _predicted(predictor, chunk, source, chunks, windows):
                write(prediction, sourced.record)
    if source.left_out:
        raise typer.Exit(FAILED)


def _opened(
    url: str, model: str, local: Path | None, device: str, timeout: float, headers: list[str],
    pem: Sequence[Path | None],
) -> Client | Pipeline:
    if local is not None:
        from rekd_deploy.client.pipeline import Pipeline

        return Pipeline(local, device=device)
    from rekd_deploy.client.client import Client
    from rekd_deploy.client.connection import TlsSettings

    pairs = (header.partition(":")[::2] for header in headers)
    named = {name.strip(): value.strip() for name, value in pairs}
    return Client(url, model=model, timeout=timeout, headers=named, tls=TlsSettings(*pem) if any(pem) else None)


def _check_kind(predictor: Client | Pipeline, given: str, place: str | Path) -> None:
    from rekd_train.errors import InputError

    kind = predictor.description.settings.kind
    if kind != given:
        fix = 'rekd-query "TEXT" or --file FILE' if kind == "text" else "rekd-query --image FILE"
        raise InputError(f"the model of {place} reads {kind}s, not {given}s; fix: {fix}")


def _predict_images(predictor: Client | Pipeline, files: list[Path], save: Path | None, json_lines: bool) -> None:
    from rekd_deploy.client.render import plain_text, write_rationale
    from rekd_train.errors import InputError
    from rekd_train.inputs.prediction import RATIONALE

    pictures = {} if save is None else {file: save / f"{file.stem}{RATIONALE}" for file in files}
    for picture, times in Counter(pictures.values()).items():
        if times > 1:
            raise InputError(f"{times} images would be saved to the same file, {picture}; fix: save them apart")
    for file, prediction in zip(files, predictor.predict(files), strict=True):
        if pictures:
            write_rationale(file, prediction, pictures[file])
        if json_lines:
            _write_json(prediction, {"image": str(file)})
            continue
        saved = f"written: {pictures[file]}\n" if pictures else ""
        sys.stdout.write(f"{file}  {plain_text(prediction)}\n{saved}\n")


def _predicted(
    predictor: Client | Pipeline, chunk: list[SourcedText], source: TextSource,
    remaining: Iterator[list[SourcedText]], windows: bool,
) -> list[tuple[SourcedText, Prediction]]:
    """The texts of a chunk, but those that are left out, and their predictions."""
    from rekd_train.errors import FaultyItemsError

    if not chunk:
        return []
    try:
        predictions = predictor.predict([sourced.text for sourced in chunk], windows=windows)
        return list(zip(chunk, predictions, strict=True))
    except FaultyItemsError as error:  # its numbers are those of the chunk
        faults = {chunk[index].number: fault for index, fault in error.faults.items()}
    if source.leaves_out(faults):
        usable = [sourced for sourced in chunk if sourced.number not in faults]
        return _predicted(predictor, usable, source, remaining, windows)
    try:
        for _ in remaining:  # what else is wrong in the file is said at once
            pass
    except FaultyItemsError as error:
        faults |= error.faults
    raise source.refusal(faults)


def _write_json(prediction: Prediction, record: Mapping[str, Any]) -> None:
    """One line: the record's keys, then the answer's; a key that both have is the record's as ``input_KEY``."""
    answer = prediction.to_dict()
    taken = re.compile(f"(input_)*({'|'.join(answer)})")  # answers of an earlier run have input_KEY already
    own = {f"input_{key}" if taken.fullmatch(key) else key: value for key, value in record.items()}
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
