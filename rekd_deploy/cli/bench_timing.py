"""rekd-bench latency and serving: what a prediction costs on this machine; and what all that measure share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rekd_train.cli.command import TrustCode

if TYPE_CHECKING:
    from rekd_deploy.bench.results import Progress, Result

RESULTS = Path("benchmarks/results")
"""Where results go unless --output says otherwise."""
LATENCY_EXAMPLES = (
    "rekd-bench latency model_repository/python --checkpoint runs/demo/student",
    "rekd-bench latency fp32/ int8/ --batches 1,8,32 --lengths 64,128,256",
    "rekd-bench latency --checkpoint runs/demo/student --without torch.compile",
)
SERVING_EXAMPLES = (
    "rekd-bench serving model_repository/python --file reviews.jsonl",
    "rekd-bench serving model_repository/python --data demo_student",
    "rekd-bench serving model_repository/python --concurrencies 1,4,16 --batches 1,2,4 --seconds 10",
    "rekd-bench serving model_repository/python --url localhost:8001",
)
_MOST_ITEMS = 500

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", show_default=f"{RESULTS}/KIND.json", help="Where the result goes."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole result as one line of JSON and nothing else.")]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """One bar for each step, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield report


def finish(measured: Result, output: Path | None, as_json: bool) -> None:
    """Write the result, show it, end with a line of JSON, and fail if a check did."""
    from rekd_deploy.bench.results import write_result
    from rekd_deploy.bench.sections import section_of
    from rekd_deploy.errors import BenchmarkError

    path = write_result(output or RESULTS / f"{measured.kind}.json", measured)
    if as_json:
        line_of_json(measured.model_dump(mode="json"))
    else:
        section = section_of(measured)
        for line in (*(f"{name}: {value}" for name, value in section.tiles), *section.lead):
            typer.echo(line)
        for table in section.tables:
            if table.rows and not table.detail:
                show_table(table.title, table.columns, table.rows)
        checks = [(check.name, check.outcome, check.words) for check in measured.checks]
        show_table("Checks", ("check", "verdict", "finding"), checks)
        typer.echo(f"result: {path}")
        outcomes = {check.name: check.outcome for check in measured.checks}
        line_of_json({"kind": measured.kind, "result": str(path), "checks": outcomes})
    if measured.failed:
        raise BenchmarkError(
            "; ".join(f"{check.name}: {check.words}" for check in measured.failed) + f"; the figures are in {path}"
        )


def show_table(title: str, columns: Any, rows: Any) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, emoji=False).print(table)


def line_of_json(document: Any) -> None:
    """One line of JSON for programs."""
    plain_ascii = "utf" not in (sys.stdout.encoding or "").lower()
    sys.stdout.write(json.dumps(document, ensure_ascii=plain_ascii, allow_nan=False) + "\n")


def _numbers(text: str, kind: type, option: str) -> tuple:
    """``1,8`` as numbers; raises a usage error."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers with commas", param_hint=option) from None


def latency(
    repositories: Annotated[list[Path] | None, typer.Argument(
        metavar="REPO", help="Model repositories of one model, for example one for each precision."
    )] = None,
    checkpoint: Annotated[Path | None, typer.Option(
        metavar="CKPT", help="Its networks are timed in PyTorch, zeroed, and as plain classifiers."
    )] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="Gives the size of the larger plain classifier.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Texts or images of a batch, with commas.")] = "1,8,32",
    lengths: Annotated[
        str, typer.Option(help="Tokens, with commas.", show_default="a short, a middle and the greatest served")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="the cores")] = None,
    rounds: Annotated[
        int, typer.Option(min=3, help="Times that every variant runs in a cell; at batch 1 five times as many.")
    ] = 15,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds that each variant runs before it is timed.")] = 0.5,
    without: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Leave out variants whose name holds it, as torch.compile.")
    ] = None,
    trust_code: TrustCode = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time every variant of a model over batch and length, in rounds, and compare them.

    Inputs are made up, as long as the length allows; they change from round to round.
    """
    from rekd_deploy.bench.latency import measure_latency
    from rekd_deploy.bench.results import checkpoint_input, repository_input, result
    from rekd_deploy.runtimes.onnxruntime import available_cores

    threads, repositories = threads or available_cores(), repositories or []
    if checkpoint is not None:
        import torch

        torch.set_num_threads(threads)
    settings = {"device": device, "threads": threads, "rounds": rounds, "warmup_seconds": warmup}
    with progress_bar() as progress:
        figures, checks = measure_latency(
            repositories, checkpoint, teacher, batches=_numbers(batches, int, "--batches"),
            lengths=_numbers(lengths, int, "--lengths"), without=without or (), progress=progress, **settings,
        )  # fmt: skip
    inputs = {f"repository {place}": repository_input(root) for place, root in enumerate(repositories, 1)}
    inputs |= {
        role: checkpoint_input(path) for role, path in (("checkpoint", checkpoint), ("teacher", teacher)) if path
    }
    finish(result("latency", figures, inputs=inputs, checks=checks, settings=settings), output, as_json)


def serving(
    repository: Annotated[
        Path, typer.Argument(metavar="REPO", help="Model repository; it is served here unless --url is given.")
    ],
    url: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="gRPC address of a server that serves REPO already.")
    ] = None,
    file: Annotated[str | None, typer.Option(
        metavar="FILE", help='Texts to send: .jsonl (key "text") or .txt.', show_default="made-up texts"
    )] = None,
    data: Annotated[str | None, typer.Option(
        metavar="PRESET|FILE", show_default="none",
        help="In place of --file: the test examples of a preset or of a TOML file with a section data."
    )] = None,
    concurrencies: Annotated[str, typer.Option(help="Concurrency of the closed loop, with commas.")] = "1,2,4,8",
    batches: Annotated[
        str, typer.Option(help="Texts or images of a request: each request has one of these sizes, with commas.")
    ] = "1",
    shares: Annotated[str, typer.Option(help="Request rates as fractions of peak throughput.")] = "0.5,0.8",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each load.")] = 5.0,
    turns: Annotated[
        int, typer.Option(min=1, help="How often each closed loop changes between the server and the pipeline.")
    ] = 3,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds of each load that are not counted.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds of the client beside the pipeline in process.")] = 50,
    seed: Annotated[int, typer.Option(help="Random seed for arrival times.")] = 0,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Load the ensemble in a closed and in an open loop, and compare it with the pipeline in process."""
    from rekd_deploy.bench.results import items_input, repository_input, result
    from rekd_deploy.bench.serving import Serving, measure_serving

    items, origin = _items(repository, file, data)
    wanted = Serving(
        repository=repository, items=items, batches=_numbers(batches, int, "--batches"), url=url,
        concurrencies=_numbers(concurrencies, int, "--concurrencies"), shares=_numbers(shares, float, "--shares"),
        seconds=seconds, turns=turns, warmup_seconds=warmup, rounds=rounds, seed=seed,
    )  # fmt: skip
    with progress_bar() as progress:
        figures, checks = measure_serving(wanted, progress)
    settings = {"seconds": seconds, "warmup_seconds": warmup, "turns": turns, "rounds": rounds, "seed": seed,
                "batches": list(wanted.batches), "server": "given" if url else "started here",
                "items": len(items)}  # fmt: skip
    inputs = {"repository": repository_input(repository), "data": items_input(items, origin)}
    finish(result("serving", figures, checks=checks, inputs=inputs, settings=settings), output, as_json)


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
        found = labelled_examples(description.labels, None, data).head(_MOST_ITEMS)
        return found.items, found.origin
    if file is None:
        from rekd_deploy.parity.examples import made_up

        return made_up(preprocessor), "made up"
    if preprocessor.settings.kind != "text":
        raise BenchmarkError(f"{file} holds texts, but the model reads images; fix: leave out --file")
    from rekd_deploy.contract.text_source import TextSource

    return [sourced.text for sourced in islice(TextSource(file), _MOST_ITEMS)], Path(file).name
