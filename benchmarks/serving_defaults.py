"""What a server answers by default: requests a second and latencies, of one client and of many, old and new defaults.

Variants are served at the same time and loaded in rounds. Requests hold one text each: tensors that were encoded
beforehand, or raw text for the endpoint. Each answer is compared with the same request asked alone, and the answers of
all variants with each other. The target onnxruntime has the same threads and instances; it is not run here, since the
embedded Triton has the python backend alone.

    python benchmarks/serving_defaults.py runs/demo/model_repository --output benchmarks/results/serving_defaults.json
    python benchmarks/serving_defaults.py REPO --before OLD     # OLD: of the same checkpoint, by an older version
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path[:0] = [str(folder) for folder in (Path(__file__).resolve().parents[1], Path(__file__).resolve().parent)]

import numpy as np
import typer
from serving_throughput import keep, line

from rekd_deploy.tuning.trials import Trials, changed, lone_model, random_requests, random_texts, shares
from rekd_train.cli.command import application, examples, run

app = application(
    help="Time a repository's defaults under load, beside those before.",
    epilog=examples("serving_defaults.py REPO", "serving_defaults.py REPO --before OLD --clients 1,8"),
)


@app.command()
def serving_defaults(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="Of the target python, reading texts.")],
    before: Annotated[Path | None, typer.Option(
        help="The same model as an older version exported it; None: REPO's ensemble as it was set then."
    )] = None,
    clients: Annotated[str, typer.Option(help="Clients, each with one request on its way, with commas.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each turn.")] = 3.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the figures go.")] = None,
) -> None:  # fmt: skip
    """Measure, print the figures and write them."""
    from rekd_deploy.repository.reader import read_description

    preprocessor = read_description(repository).preprocessor()
    requests, texts = random_requests(preprocessor), random_texts(preprocessor)
    counts = [int(count) for count in clients.split(",")]
    with Trials() as trials:
        was = before or changed(repository, trials.folder / "before", shares(0, 1))
        urls = {"before": trials.serve(was), "now": trials.serve(repository)}
        tensors = ["before", "now, two steps", "now"]
        groups: dict[str, list[str]] = {"tensors": tensors, "texts": []}
        for name in tensors:
            model = lone_model(repository) if name == "now" else "rekd"
            trials.add(name, urls[name.partition(",")[0]], model, requests)
        for name in ("before", "now"):
            if ((was if name == "before" else repository) / "rekd_text").is_dir():
                groups["texts"].append(f"{name}, text")
                trials.add_asking(groups["texts"][-1], urls[name], _endpoint(urls[name], texts), len(texts))
        differing = {
            name: trials.differing(name, names[0]) for names in groups.values() for name in names[1:]
        }  # fmt: skip
        cells = trials.measured(counts, rounds, seconds, lambda cell: typer.echo(line(cell), err=True))
    settings = {"rounds": rounds, "seconds": seconds, "texts": len(texts), "before": "older export" if before else ""}
    keep({
        "settings": settings, "answers_other_than_before": differing, "cells": cells,
    }, output)  # fmt: skip


def _endpoint(url: str, texts: list[str]):
    """A function: number -> the endpoint's answer to that text."""
    import tritonclient.grpc as grpc

    client = grpc.InferenceServerClient(url)

    def ask(number: int) -> dict[str, Any]:
        tensor = grpc.InferInput("text", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[texts[number].encode()]], dtype=object))
        response = client.infer("rekd_text", [tensor])
        spans = json.loads(response.as_numpy("rationale")[0, 0])
        return {
            "label": response.as_numpy("label"), "probabilities": response.as_numpy("probabilities"),
            "truncated": response.as_numpy("truncated"),
            "spans": np.array([(span["start"], span["end"]) for span in spans]),
        }  # fmt: skip

    return ask


if __name__ == "__main__":
    run(app)
