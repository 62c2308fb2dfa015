"""Requests a second through Triton's python backend: texts of all lengths as one batch or not, threads and instances.

Every variant of a repository is served at the same time, on its own server, and they are loaded in rounds, so that a
machine that slows down slows all of them. Requests are tensors of one text each, encoded beforehand; lengths lie evenly
between the shortest and the longest on a logarithmic scale. Each answer is compared with the same request asked alone.

    python benchmarks/serving_throughput.py batching runs/demo/model_repository
    python benchmarks/serving_throughput.py threads runs/demo/model_repository --clients 1,8
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer

from rekd_deploy.bench.serving import read_totals, steps_between
from rekd_deploy.bench.timing import Load, closed_loop, merged
from rekd_train.cli.command import application, examples, print_json, run

OUTPUTS = ("mask", "probabilities")
Variants = dict[str, dict[str, Any]]

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
    from rekd_deploy.bench.results import hardware, versions
    from rekd_deploy.client.transport import open_transport
    from rekd_deploy.repository.reader import read_description
    from rekd_deploy.server.server import TritonServer
    from rekd_train.files import write_json

    requests = _requests(read_description(repository).preprocessor(), shortest)
    cells: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        asked = {}
        for number, (name, changes) in enumerate(_variants(differing).items()):
            server = TritonServer(_changed(repository, folder / str(number), **changes), 0, 0, 0)
            url = stack.enter_context(server).grpc_url
            transport = open_transport(url, 30.0)
            stack.callback(transport.close)
            asked[name] = _Asked(transport, url, requests)
        for count in map(int, clients.split(",")):
            loads: dict[str, list[Load]] = {name: [] for name in asked}
            before = {name: read_totals(each.url) for name, each in asked.items()}
            for turn in range(rounds):
                for name in list(asked) if turn % 2 == 0 else reversed(asked):
                    loads[name].append(closed_loop(asked[name], concurrency=count, seconds=seconds, warmup_seconds=0.5))
            for name, each in asked.items():
                steps = steps_between(before[name], read_totals(each.url))
                cells.append({
                    "variant": name, "clients": count, **merged(loads[name]).figures(),
                    "per_second_by_turn": [load.per_second for load in loads[name]],
                    "rows_per_execution": {model: step["rows_per_batch"] for model, step in steps.items()},
                    "answers_compared": dict(each.judged),
                })
                each.judged.clear()
                typer.echo(_line(cells[-1]), err=True)
    result = {
        "command": shlex.join(["python", "benchmarks/serving_throughput.py", *sys.argv[1:]]),
        "hardware": hardware(), "versions": versions(),
        "settings": {"rounds": rounds, "seconds": seconds, "shortest": shortest, "texts": len(requests),
                     "padded_lengths": dict(Counter(str(each["input_ids"].shape[1]) for each in requests))},
        "cells": cells,
    }  # fmt: skip
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, result)
    else:
        print_json(result)


class _Asked:
    """A served variant: each answer is compared with that of the same request alone, asked beforehand."""

    def __init__(self, transport, url: str, requests: list[dict[str, np.ndarray]]) -> None:
        self.url, self.judged = url, Counter()
        self._transport, self._requests = transport, requests
        self._alone = [self._ask(request) for request in requests]

    def __call__(self, number: int) -> None:
        place = number % len(self._requests)
        answer, alone = self._ask(self._requests[place]), self._alone[place]
        same = np.array_equal(answer["mask"], alone["mask"]) and np.allclose(
            answer["probabilities"], alone["probabilities"], rtol=0, atol=1e-4
        )
        self.judged["equal" if same else "different"] += 1

    def _ask(self, request):
        return self._transport.submit("rekd", request, OUTPUTS).result()


def _variants(differing: str) -> Variants:
    cores = len(os.sched_getaffinity(0))
    if differing == "batching":
        return {
            "one shape": {"ragged": False}, "all lengths": {"padding": 1e9}, "at most twice as long": {"padding": 2.0},
            "at most a quarter longer": {"padding": 1.25}, "all lengths, run apart": {"padding": 1.0},
        }
    if differing == "threads":
        pairs = sorted({(cores, 1), (1, 1), (1, cores), (max(1, cores // 2), 2), (cores, cores)})
        return {f"{threads} threads, {instances} instances": {"threads": threads, "instances": instances}
                for threads, instances in pairs}  # fmt: skip
    raise typer.BadParameter(f"'{differing}' is neither batching nor threads")


def _changed(
    source: Path, target: Path, *, ragged: bool = True, padding: float | None = None, threads: int = 0,
    instances: int = 1,
) -> Path:
    """A copy of a repository whose models run otherwise."""
    from rekd_deploy.repository.config import PREDICTOR, SELECTOR, THREADS, config_text, read_config
    from rekd_deploy.repository.reader import MANIFEST
    from rekd_train.files import sha256, write_json, write_text

    shutil.copytree(source, target)
    for name in (SELECTOR, PREDICTOR):
        config = read_config(target / name / "config.pbtxt")
        if not ragged:
            config.parameters.pop("pad_id")
            for tensor in config.input:
                tensor.allow_ragged_batch = False
        config.parameters[THREADS].string_value = str(threads)
        config.instance_group[0].count = instances
        write_text(target / name / "config.pbtxt", config_text(config))
        if padding is not None:
            code = next(target.glob(f"{name}/*/model.py"))
            write_text(code, f"{code.read_text(encoding='utf-8')}\n\ngroups_by_length.__defaults__ = ({padding!r},)\n")
    manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    files = manifest["repository"]["files"]
    manifest["repository"]["files"] = {name: sha256(target / name) for name in files}
    write_json(target / MANIFEST, manifest)
    return target


def _requests(preprocessor, shortest: int, count: int = 509) -> list[dict[str, np.ndarray]]:
    """A prime number of them, so that clients in step do not ask the same."""
    random = np.random.default_rng(0)
    words = preprocessor.words()
    lengths = np.exp(random.uniform(np.log(shortest), np.log(preprocessor.positions + 1), size=count)).astype(int)
    return [dict(preprocessor([" ".join(random.choice(words, size=length - 2))]).inputs) for length in lengths]


def _line(cell: dict[str, Any]) -> str:
    rows = ", ".join(f"{model.removeprefix('rekd_')} {rows:.2f}" for model, rows in cell["rows_per_execution"].items())
    times = cell["milliseconds"]
    return (f"{cell['clients']:>3} clients, {cell['variant']:<24} {cell['per_second']:7.1f}/s  p50 {times['p50']:.2f} "
            f"ms  p99 {times['p99']:.2f} ms  rows: {rows}  {cell['answers_compared']}")  # fmt: skip


if __name__ == "__main__":
    run(app)
