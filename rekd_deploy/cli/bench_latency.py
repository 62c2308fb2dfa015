"""rekd-bench latency: what an answer costs, step by step and in every form, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rekd_deploy.cli.bench_common import AsJson, Output, finish, progress_bar

NAME = "latency"
EXAMPLES = (
    "rekd-bench latency model_repository/python --checkpoint runs/demo/student --teacher runs/demo/teacher",
    "rekd-bench latency fp32/ int8/ --batches 1,8,32 --lengths 64,128,256",
    "rekd-bench latency --checkpoint runs/demo/student --budgets 0.05,0.1,0.2 --without torch.compile",
)


def command(
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
    _use_threads(threads, checkpoint)
    with progress_bar() as progress:
        figures, checks = measure_latency(subjects, grid, progress)
    inputs = {f"repository {place}": repository_input(root) for place, root in enumerate(subjects.repositories, 1)}
    inputs |= {
        role: checkpoint_input(path) for role, path in (("checkpoint", checkpoint), ("teacher", teacher)) if path
    }
    measured = result(
        NAME, figures, inputs=inputs, checks=checks,
        settings={"device": device, "threads": threads, "rounds": rounds, "warmup_seconds": warmup},
    )  # fmt: skip
    columns = ("form", "batch", "length", "p50 ms", "p95 ms", "p99 ms", "a second", "of the first classifier")
    finish(measured, output, as_json, rows(figures), columns)


def numbers(text: str, kind: type, option: str) -> tuple:
    """``1,8`` as numbers; raises a usage error."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers with commas", param_hint=option) from None


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
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


def _use_threads(threads: int, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        import torch

        torch.set_num_threads(threads)
