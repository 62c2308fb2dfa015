"""rekd-bench latency and serving: what a prediction costs on this machine, in every variant and under load."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from rekd_deploy.cli.bench_common import AsJson, Output, finish, numbers, progress_bar

LATENCY_EXAMPLES = (
    "rekd-bench latency model_repository/python --checkpoint runs/demo/student --teacher runs/demo/teacher",
    "rekd-bench latency fp32/ int8/ --batches 1,8,32 --lengths 64,128,256",
    "rekd-bench latency --checkpoint runs/demo/student --budgets 0.05,0.1,0.2 --without torch.compile",
)
SERVING_EXAMPLES = (
    "rekd-bench serving model_repository/python --file reviews.jsonl",
    "rekd-bench serving model_repository/python --data demo_student",
    "rekd-bench serving model_repository/python --concurrencies 1,4,16 --batches 1,2,4 --seconds 10",
    "rekd-bench serving model_repository/python --url localhost:8001 --rates 50,100,200",
)
_MOST_ITEMS = 500


def latency(
    repositories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="REPO", help="Model repositories of one model, for example one for each precision."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT", help="Its networks are timed in PyTorch, zeroed, as plain classifiers and with other K."
        ),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="Gives the size of the larger plain classifier.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Texts or images answered at once, with commas.")] = "1,8,32",
    lengths: Annotated[
        str, typer.Option(help="Tokens, with commas.", show_default="a short, a middle and the greatest served")
    ] = "",
    budgets: Annotated[
        str, typer.Option(help="Further shares that a compacted pair may keep, with commas.", show_default="none")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="the cores")] = None,
    rounds: Annotated[
        int, typer.Option(min=3, help="Times that every form runs in a cell; at batch 1 five times as many.")
    ] = 15,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds that each form runs before it is timed.")] = 0.5,
    without: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Leave out forms whose name holds it, as torch.compile.")
    ] = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time every form of a model over batch, length and K, in turns, and compare them.

    Inputs are made up, as long as the length allows; they change from round to round.
    """
    from rekd_deploy.bench.latency import Grid, Subjects, measure_latency
    from rekd_deploy.bench.results import checkpoint_input, repository_input, result
    from rekd_deploy.runtimes.onnxruntime import available_cores

    threads = threads or available_cores()
    subjects = Subjects(tuple(repositories or ()), checkpoint, teacher)
    grid = Grid(
        batches=numbers(batches, int, "--batches"), lengths=numbers(lengths, int, "--lengths"),
        budgets=numbers(budgets, float, "--budgets"), rounds=rounds, warmup_seconds=warmup, device=device,
        threads=threads, without=tuple(without or ()),
    )  # fmt: skip
    if checkpoint is not None:
        import torch

        torch.set_num_threads(threads)
    with progress_bar() as progress:
        figures, checks = measure_latency(subjects, grid, progress)
    inputs = {f"repository {place}": repository_input(root) for place, root in enumerate(subjects.repositories, 1)}
    inputs |= {
        role: checkpoint_input(path) for role, path in (("checkpoint", checkpoint), ("teacher", teacher)) if path
    }
    measured = result(
        "latency", figures, inputs=inputs, checks=checks,
        settings={"device": device, "threads": threads, "rounds": rounds, "warmup_seconds": warmup},
    )  # fmt: skip
    columns = ("form", "batch", "length", "p50 ms", "p95 ms", "p99 ms", "a second", "of the first classifier")
    finish(measured, output, as_json, latency_rows(figures), columns)


def latency_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table: a line for each form in each cell, and what could not be timed."""
    lines = []
    for cell in figures["cells"]:
        ratios = {each["way"]: each for each in reversed(cell["ratios"]) if "classifier" in each["baseline"]}
        for way in cell["ways"]:
            times, ratio = way["milliseconds"], ratios.get(way["name"])
            shown = f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""
            lines.append((
                way["name"], str(cell["batch"]), str(cell["length"]), f"{times['p50']:.2f}", f"{times['p95']:.2f}",
                f"{times['p99']:.2f}", f"{way['items_per_second']:.0f}", shown,
            ))  # fmt: skip
    return lines + [(each["name"], "", "", "not run", "", "", "", each["reason"]) for each in figures["not_run"]]


def serving(
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
    concurrencies: Annotated[str, typer.Option(help="Concurrency of the closed loop, with commas.")] = "1,2,4,8",
    batches: Annotated[
        str, typer.Option(help="How many texts or images a request asks about: each has one of these sizes.")
    ] = "1",
    shares: Annotated[
        str, typer.Option(help="Request rates as fractions of peak throughput.")
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
    seed: Annotated[int, typer.Option(help="Random seed for arrival times.")] = 0,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Load the ensemble in a closed and in an open loop, and compare it with the pipeline in process."""
    from rekd_deploy.bench.results import items_input, repository_input, result
    from rekd_deploy.bench.serving import Serving, measure_serving

    items, origin = _items(repository, file, data)
    wanted = Serving(
        repository=repository, items=items, batches=numbers(batches, int, "--batches"), url=url,
        concurrencies=numbers(concurrencies, int, "--concurrencies"), shares=numbers(shares, float, "--shares"),
        rates=numbers(rates, float, "--rates"), seconds=seconds, turns=turns, warmup_seconds=warmup, rounds=rounds,
        perf_analyzer=perf_analyzer, seed=seed,
    )  # fmt: skip
    with progress_bar() as progress:
        figures, checks = measure_serving(wanted, progress)
    measured = result(
        "serving", figures, checks=checks,
        inputs={"repository": repository_input(repository), "data": items_input(items, origin)},
        settings={"seconds": seconds, "warmup_seconds": warmup, "turns": turns, "rounds": rounds, "seed": seed,
                  "batches": list(wanted.batches), "server": "given" if url else "started here",
                  "items": len(items)},
    )  # fmt: skip
    columns = ("load", "p50 ms", "p95 ms", "p99 ms", "a second", "failed", "in the server, mean ms")
    finish(measured, output, as_json, serving_rows(figures), columns)


def serving_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table: a line for each load."""
    lines = []
    for load in figures["closed"]:
        lines.append((f"closed, {load['concurrency']} clients", *_figures(load), _steps(load["steps"])))
        if load["in_process"]:
            share = f"throughput served / here {load['throughput']['ratio']:.2f}" if load["throughput"] else ""
            lines.append(("  the same in process", *_figures(load["in_process"]), share))
    for load in figures["open"]:
        lines.append((f"open, {load['rate']:.1f} a second", *_figures(load), ""))
    for found in figures["perf_analyzer"]:
        times = tuple(f"{found[name]:.2f}" if name in found else "" for name in ("p50", "p95", "p99"))
        title = f"perf_analyzer, {found['concurrency']:.0f} clients"
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
