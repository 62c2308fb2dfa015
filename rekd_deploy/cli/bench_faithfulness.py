"""rekd-bench faithfulness: is the rationale the reason?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rekd_deploy.cli.bench_accuracy import Checkpoint, Data, Overrides, Split
from rekd_deploy.cli.bench_common import AsJson, Output, finish, progress_bar

NAME = "faithfulness"
EXAMPLES = (
    "rekd-bench faithfulness model_repository/python --checkpoint runs/demo/student",
    "rekd-bench faithfulness model_repository/python --checkpoint runs/demo/student --judge runs/judge --examples 500",
    "rekd-bench faithfulness model_repository/python --data reviews.csv",
)


def command(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="Model repository written by rekd-export.")],
    checkpoint: Checkpoint = None,
    data: Data = None,
    overrides: Overrides = None,
    split: Split = "test",
    examples: Annotated[int, typer.Option(min=20, help="The first so many examples.")] = 1000,
    judge: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", show_default="CKPT.judge",
            help="Checkpoint of the independent judge; trained and kept there if it is not there yet.",
        ),
    ] = None,  # fmt: skip
    judge_epochs: Annotated[
        float | None,
        typer.Option(min=0.01, help="How long a judge is trained.", show_default="as the predictor's warm start"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random masks, the donors and the folds.")] = 0,
    engine: Annotated[bool, typer.Option("--engine", help="Run the TensorRT engines.")] = False,
    device: Annotated[str, typer.Option(help="Of the judges: cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Test whether the answer depends on the kept features alone, on their content, and not on their pattern.

    Without --checkpoint what needs a judge is left out.
    """
    from rekd_deploy.bench.faithfulness import FaithfulnessOptions, measure_faithfulness
    from rekd_deploy.bench.results import figure_rows

    options = FaithfulnessOptions(
        repository=repository, checkpoint=checkpoint, data=data, overrides=tuple(overrides or ()), split=split,
        examples=examples, judge=judge, judge_epochs=judge_epochs, seed=seed, engine=engine,
        device=device,
    )  # fmt: skip
    with progress_bar() as progress:
        measured = measure_faithfulness(options, progress)
    finish(measured, output, as_json, figure_rows(measured.figures), ("figure", "value"))
