"""rekd-bench accuracy: how good the served answers are, and whether they are still the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rekd_deploy.cli.bench_common import AsJson, Output, finish, progress_bar

NAME = "accuracy"
EXAMPLES = (
    "rekd-bench accuracy model_repository/python --checkpoint runs/demo/student",
    "rekd-bench accuracy --url localhost:8001 --checkpoint runs/demo/student --examples 500",
    "rekd-bench accuracy model_repository/python --data reviews.csv --set data.label_column=stars",
)

Repository = Annotated[
    Path | None, typer.Argument(metavar="REPO", help="Model repository written by rekd-export, answered in process.")
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="CKPT", help="What the repository was exported from.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="PRESET|FILE", show_default="the checkpoint's own",
        help="Labelled examples: a preset, a TOML file with a section data, or a table (.csv, .tsv, .jsonl, .parquet).",
    ),
]  # fmt: skip
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the data.")
]
Split = Annotated[str, typer.Option(help="train, dev or test; of a table every row is measured.")]


def command(
    repository: Repository = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask a server instead: HOST:PORT (gRPC) or http://HOST:PORT."),
    ] = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    overrides: Overrides = None,
    split: Split = "test",
    examples: Annotated[
        int | None, typer.Option(min=1, help="The first so many examples.", show_default="all")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="POINTS", show_default="0.5, int8: 1",
            help="Largest gap to the checkpoint's accuracy, in percentage points.",
        ),
    ] = None,  # fmt: skip
    single_graph: Annotated[bool, typer.Option("--single-graph", help="Answer with the graph of both steps.")] = False,
    engine: Annotated[bool, typer.Option("--engine", help="Answer with the TensorRT engines.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Where REPO is answered: cpu, cuda or cuda:N.", show_default="cpu")
    ] = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Measure the served answers: accuracy given the rationale, rate, curve, classes, calibration.

    A gap to the checkpoint's own accuracy beyond the limit is an error.
    """
    if (repository is None) == (url is None):
        raise typer.BadParameter("give either a repository or --url", param_hint="REPO")
    from rekd_deploy.bench.accuracy import AccuracyOptions, measure_accuracy
    from rekd_deploy.bench.results import figure_rows

    options = AccuracyOptions(
        repository=repository, url=url, checkpoint=checkpoint, data=data, overrides=tuple(overrides or ()),
        split=split, examples=examples, limit=limit, single_graph=single_graph, engine=engine, device=device,
    )  # fmt: skip
    with progress_bar() as progress:
        measured = measure_accuracy(options, progress)
    finish(measured, output, as_json, figure_rows(measured.figures), ("figure", "value"))
