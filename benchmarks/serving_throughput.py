"""Requests a second through Triton's python backend: texts of all lengths as one batch or not, threads and instances.

Every variant of a repository is served at the same time, on its own server, and they are loaded in rounds, so that a
machine that slows down slows all of them. Requests are tensors of one text each, encoded beforehand; lengths lie evenly
between the shortest and the longest on a logarithmic scale. Each answer is compared with the same request asked alone.

    python benchmarks/serving_throughput.py batching runs/demo/model_repository
    python benchmarks/serving_throughput.py threads runs/demo/model_repository --clients 1,8
"""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from rekd_deploy.tuning.trials import Trials, changed, random_requests, shares
from rekd_train.cli.command import application, examples, print_json, run

STEPS = ("rekd_selector", "rekd_predictor")
_PARTED = """_parted = groups_by_length


def groups_by_length(inputs, run_in_tokens):
    return _parted(inputs, {})"""
app = application(
    help="Time variants of one repository under load, in rounds.",
    epilog=examples("serving_throughput.py batching REPO", "serving_throughput.py threads REPO --clients 1,8"),
)


@app.command()
def serving_throughput(
    differing: Annotated[str, typer.Argument(metavar="batching|threads", help="What the variants differ in.")],
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="Of the target python, reading texts.")],
    clients: Annotated[str, typer.Option(help="Clients, each with one request on its way, with commas.")] = "1,16",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each turn.")] = 4.0,
    shortest: Annotated[int, typer.Option(min=3, help="Tokens of the shortest text.")] = 8,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the figures go.")] = None,
) -> None:
    """Measure, print the figures and write them."""
    from rekd_deploy.repository.reader import read_description

    requests = random_requests(read_description(repository).preprocessor(), shortest)
    with Trials() as trials:
        for number, (name, (edit, code)) in enumerate(_variants(differing).items()):
            copy = changed(repository, trials.folder / str(number), edit, code, models=STEPS)
            trials.add(name, trials.serve(copy), "rekd", requests)
        counts = [int(count) for count in clients.split(",")]
        cells = trials.measured(counts, rounds, seconds, lambda cell: typer.echo(line(cell), err=True))
    lengths = dict(Counter(str(each["input_ids"].shape[1]) for each in requests))
    settings = {"rounds": rounds, "seconds": seconds, "shortest": shortest, "texts": len(requests)}
    keep({"settings": {**settings, "padded_lengths": lengths}, "cells": cells}, output)


def keep(figures: dict[str, Any], output: Path | None) -> None:
    """Write figures with the command and the machine to a file, or print them."""
    from rekd_deploy.bench.results import hardware, versions
    from rekd_train.files import write_json

    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    result = {"command": command, "hardware": hardware(), "versions": versions(), **figures}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, result)
    else:
        print_json(result)


def _variants(differing: str) -> dict[str, tuple[Callable, str]]:
    """By name what ``changed`` changes: a configuration, and the code."""
    cores = len(os.sched_getaffinity(0))
    if differing == "batching":
        limits = {"all lengths": 1e9, "as padding and runs cost": None, "all lengths, run apart": 0}
        code = {name: "" if limit is None else _PARTED.format(limit) for name, limit in limits.items()}
        return {"one shape": (_unjoined, ""), **{name: (shares(0, 2), each) for name, each in code.items()}}
    if differing == "threads":
        pairs = sorted({(cores, 1), (1, 1), (1, cores), (max(1, cores // 2), 2), (cores, cores)})
        return {f"{threads} threads, {instances} instances": (shares(threads, instances), "")
                for threads, instances in pairs}  # fmt: skip
    raise typer.BadParameter(f"'{differing}' is neither batching nor threads")


def _unjoined(config) -> None:
    shares(0, 2)(config)
    config.parameters.pop("pad_id")
    for tensor in config.input:
        tensor.allow_ragged_batch = False


def line(cell: dict[str, Any]) -> str:
    rows = ", ".join(f"{model.removeprefix('rekd_')} {rows:.2f}" for model, rows in cell["rows_per_execution"].items())
    times = cell["milliseconds"]
    return (f"{cell['clients']:>3} clients, {cell['variant']:<24} {cell['per_second']:7.1f}/s  p50 {times['p50']:.2f} "
            f"ms  p99 {times['p99']:.2f} ms  rows: {rows}  {cell['answers_compared']}")  # fmt: skip


if __name__ == "__main__":
    run(app)
