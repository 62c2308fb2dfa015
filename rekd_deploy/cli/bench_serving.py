"""rekd-bench serving: the served model under load, where its time goes, and what serving costs."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from rekd_deploy.cli.bench_common import AsJson, Output, finish, progress_bar
from rekd_deploy.cli.bench_latency import numbers

NAME = "serving"
EXAMPLES = (
    "rekd-bench serving model_repository/python --file reviews.jsonl",
    "rekd-bench serving model_repository/python --data demo_student",
    "rekd-bench serving model_repository/python --concurrencies 1,4,16 --batches 1,2,4 --seconds 10",
    "rekd-bench serving model_repository/python --url localhost:8001 --rates 50,100,200",
)
_MOST_ITEMS = 500


def command(
    repository: Annotated[
        Path, typer.Argument(metavar="REPO", help="Model repository; it is served here unless --url is given.")
    ],
    url: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="gRPC address of a server that serves REPO already.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help='Texts to ask about: .jsonl (key "text") or .txt.', show_default="made-up texts"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET|FILE", show_default="none",
            help="In place of --file: the test examples of a preset or of a TOML file with a section data.",
        ),
    ] = None,
    concurrencies: Annotated[str, typer.Option(help="Askers of the closed loop, with commas.")] = "1,2,4,8",
    batches: Annotated[
        str, typer.Option(help="How many texts or images a request asks about: each has one of these sizes.")
    ] = "1",
    shares: Annotated[
        str, typer.Option(help="Rates of the open loop in shares of the closed loop's highest throughput.")
    ] = "0.5,0.8",
    rates: Annotated[
        str, typer.Option(help="Rates of the open loop, requests a second, in place of --shares.", show_default="none")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each load.")] = 5.0,
    turns: Annotated[
        int, typer.Option(min=1, help="How often each closed loop changes between the server and the pipeline.")
    ] = 3,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds of each load and turn that are not counted.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=3, help="Turns of the client against the pipeline in process.")] = 50,
    perf_analyzer: Annotated[
        bool, typer.Option(help="Ask Triton's own load generator, too, where it is installed.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Load the ensemble in a closed and in an open loop, and hold it against the pipeline in process."""
    from rekd_deploy.bench.results import items_input, repository_input, result
    from rekd_deploy.bench.serving import Serving, measure_serving

    items, origin = _items(repository, file, data)
    serving = Serving(
        repository=repository, items=items, batches=numbers(batches, int, "--batches"), url=url,
        concurrencies=numbers(concurrencies, int, "--concurrencies"), shares=numbers(shares, float, "--shares"),
        rates=numbers(rates, float, "--rates"), seconds=seconds, turns=turns, warmup_seconds=warmup, rounds=rounds,
        perf_analyzer=perf_analyzer, seed=seed,
    )  # fmt: skip
    with progress_bar() as progress:
        figures, checks = measure_serving(serving, progress)
    measured = result(
        NAME, figures, checks=checks,
        inputs={"repository": repository_input(repository), "data": items_input(items, origin)},
        settings={"seconds": seconds, "warmup_seconds": warmup, "turns": turns, "rounds": rounds, "seed": seed,
                  "batches": list(serving.batches), "server": "given" if url else "started here",
                  "items": len(items)},
    )  # fmt: skip
    columns = ("load", "p50 ms", "p95 ms", "p99 ms", "a second", "failed", "in the server, mean ms")
    finish(measured, output, as_json, rows(figures), columns)


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table: a line for each load."""
    lines = []
    for load in figures["closed"]:
        lines.append((f"closed, {load['concurrency']} askers", *_figures(load), _steps(load["steps"])))
        if load["in_process"]:
            share = f"throughput served / here {load['throughput']['ratio']:.2f}" if load["throughput"] else ""
            lines.append(("  the same in process", *_figures(load["in_process"]), share))
    for load in figures["open"]:
        lines.append((f"open, {load['rate']:.1f} a second", *_figures(load), ""))
    for found in figures["perf_analyzer"]:
        times = tuple(f"{found[name]:.2f}" if name in found else "" for name in ("p50", "p95", "p99"))
        title = f"perf_analyzer, {found['concurrency']:.0f} askers"
        lines.append((title, *times, f"{found['per_second']:.1f}", "", ""))
    if figures["perf_analyzer_not_run"]:
        lines.append(("perf_analyzer", "not run", "", "", "", "", figures["perf_analyzer_not_run"]))
    for name, times in figures["in_process"]["milliseconds"].items():
        shown = tuple(f"{times[key]:.2f}" for key in ("p50", "p95", "p99"))
        lines.append((f"one at a time, {name}", *shown, "", "", ""))
    ratio = figures["in_process"]["ratio"]
    lines.append(("served / in process", f"{ratio['ratio']:.2f}", "", "", "", "",
                  f"95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}"))  # fmt: skip
    added = figures["in_process"]["added_ms"]
    lines.append(("served - in process", f"{added['p50']:.2f}", "", "", "", "",
                  f"95 % interval {added['low']:.2f} to {added['high']:.2f}"))  # fmt: skip
    return lines


def _figures(load: dict[str, Any]) -> tuple[str, ...]:
    times = load["milliseconds"]
    shown = tuple(f"{times[name]:.2f}" for name in ("p50", "p95", "p99")) if times else ("none",) * 3
    return (*shown, f"{load['per_second']:.1f}", str(load["failed"]))


def _steps(steps: dict[str, dict[str, Any]]) -> str:
    return "; ".join(
        f"{model.removeprefix('rekd_')}: {step['queue_ms']:.2f} queue + {step['compute_ms']:.2f} compute"
        for model, step in steps.items() if step["compute_ms"] and model != "rekd"
    )


def _items(repository: Path, file: str | None, data: str | None) -> tuple[list[Any], str]:
    """Texts of the file, examples of the data, else what the repository's preprocessing can make up."""
    from rekd_deploy.errors import BenchmarkError
    from rekd_deploy.repository.reader import read_description

    description = read_description(repository)
    preprocessor = description.preprocessor()
    if data is not None:
        from rekd_deploy.bench.examples import labelled_examples

        if file is not None:
            raise BenchmarkError(f"--file {file} and --data {data} are two sources; fix: give one of them")
        found = labelled_examples(description.labels, checkpoint=None, data=data).head(_MOST_ITEMS)
        return found.items, found.origin
    if file is None:
        from rekd_deploy.bench.latency import calibration_items

        return calibration_items(preprocessor), "made up"
    if preprocessor.settings.kind != "text":
        raise BenchmarkError(f"{file} holds texts, but the model reads images; fix: leave out --file")
    from rekd_deploy.contract.text_source import TextSource

    return [sourced.text for sourced in islice(TextSource(file), _MOST_ITEMS)], Path(file).name
