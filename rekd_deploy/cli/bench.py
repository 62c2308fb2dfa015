"""rekd-bench: is it fast, is it right, is the rationale the reason?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rekd_deploy.cli.bench_common import AsJson, Output, finish, progress_bar
from rekd_deploy.cli.bench_timing import LATENCY_EXAMPLES, SERVING_EXAMPLES, latency, serving
from rekd_train.cli.command import application, examples, run

if TYPE_CHECKING:
    from rekd_deploy.bench.report.compare import Comparison

ACCURACY_EXAMPLES = (
    "rekd-bench accuracy model_repository/python --checkpoint runs/demo/student",
    "rekd-bench accuracy --url localhost:8001 --checkpoint runs/demo/student --examples 500",
    "rekd-bench accuracy model_repository/python --data reviews.csv --set data.label_column=stars",
)
FAITHFULNESS_EXAMPLES = (
    "rekd-bench faithfulness model_repository/python --checkpoint runs/demo/student",
    "rekd-bench faithfulness model_repository/python --checkpoint runs/demo/student --judge runs/judge --examples 500",
    "rekd-bench faithfulness model_repository/python --data reviews.csv",
)
REPORT_EXAMPLES = (
    "rekd-bench report benchmarks/results/*.json --output report.html",
    "rekd-bench report benchmarks/results/gpu",
    "rekd-bench report accuracy.json latency.json --answers answers.jsonl --title 'Reviews, March'",
)
COMPARE_EXAMPLES = (
    "rekd-bench compare old.json new.json --fail-above 10%",
    "rekd-bench compare main/accuracy.json branch/accuracy.json --fail-points 0.5",
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


def accuracy(
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
        int | None, typer.Option(min=1, help="The first N examples.", show_default="all")
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


def faithfulness(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="Model repository written by rekd-export.")],
    checkpoint: Checkpoint = None,
    data: Data = None,
    overrides: Overrides = None,
    split: Split = "test",
    examples: Annotated[int, typer.Option(min=20, help="The first N examples.")] = 1000,
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


def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT", help="Result files of rekd-bench, of any kind; folders of benchmarks/gpu.py."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page; the summary lies beside it as .md.")
    ] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading.")] = "What the rationales cost, and what they are worth",
    note: Annotated[list[str] | None, typer.Option(help="A paragraph under the heading.")] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Answers to show with their rationales: lines of rekd-query --json."),
    ] = None,
    show: Annotated[int, typer.Option(min=1, help="Most answers shown of each file.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last line alone.")] = False,
) -> None:
    """Make one self-contained page and a Markdown summary of results."""
    from rekd_deploy.bench.report.gpu import read_gpu
    from rekd_deploy.bench.report.page import Report, read_answers, write_report
    from rekd_deploy.bench.results import read_result

    shown = [answer for file in answers or [] for answer in read_answers(file, show)]
    found = [read_gpu(path) if path.is_dir() else read_result(path) for path in results]
    made = Report(title, found, shown, tuple(note or ()))
    page, markdown = write_report(made, output, output.with_suffix(".md"))
    if not as_json:
        typer.echo(f"page     {page}\nsummary  {markdown}")
    document = {"kind": "report", "page": str(page), "summary": str(markdown), "bytes": page.stat().st_size}
    sys.stdout.write(json.dumps(document) + "\n")


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Result file of rekd-bench.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another of the same kind.")],
    fail_above: Annotated[
        str, typer.Option(metavar="PERCENT", help="Largest change for the worse of times, as 10%.")
    ] = "10%",
    fail_points: Annotated[
        float, typer.Option(min=0.0, help="Largest change for the worse of accuracies, in percentage points.")
    ] = 1.0,
    other_hardware: Annotated[
        bool, typer.Option("--other-hardware", help="Compare although the machines differ.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as one line of JSON and nothing else.")
    ] = False,
) -> None:
    """Match the figures of two results; exit code 1 if one is worse beyond the limit and beyond the noise."""
    from rekd_deploy.bench.report import compare as comparison
    from rekd_deploy.bench.results import read_result
    from rekd_deploy.errors import BenchmarkError

    limit = _percent(fail_above)
    found = comparison.compare(
        read_result(old), read_result(new), percent=limit, points=fail_points, other_hardware=other_hardware
    )
    if not as_json:
        _show_comparison(found)
    sys.stdout.write(json.dumps(found.to_dict(), ensure_ascii=True) + "\n")
    if found.failed:
        raise BenchmarkError(f"worse than {old}: {'; '.join(found.failed)}")


def _percent(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"'{text}' is no percentage; give one as 10%", param_hint="--fail-above")
    return value


def _show_comparison(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table()
    for column in ("figure", "old", "new", "change", "verdict"):
        table.add_column(column, justify="left" if column in ("figure", "verdict") else "right", overflow="fold")
    for change in found.changes:
        unit = " points" if change.old.points else " %"
        table.add_row(
            change.name, f"{change.old.value:.4g}", f"{change.new.value:.4g}", f"{change.change:+.1f}{unit}",
            change.outcome,
        )  # fmt: skip
    console.print(table)
    notes = {"only in the old": found.only_old, "only in the new": found.only_new, "note": found.notes}
    for title, lines in {**notes, "fails now": found.broken}.items():
        for line in lines:
            console.print(f"{title}: {line}", soft_wrap=True)


SUBCOMMANDS = {
    latency: LATENCY_EXAMPLES, serving: SERVING_EXAMPLES, accuracy: ACCURACY_EXAMPLES,
    faithfulness: FAITHFULNESS_EXAMPLES, report: REPORT_EXAMPLES, compare: COMPARE_EXAMPLES,
}  # fmt: skip
"""With lines for --help, in the order of --help."""

app = application(
    help="Measure a served model: what an answer costs, how good it is, whether the rationale is the reason.\n\n"
    "A table for people, a last line of JSON for machines, and a result file with the hardware and versions. Exit "
    "code 1 if a check fails.",
    epilog=examples(*(lines[0] for lines in SUBCOMMANDS.values()), "rekd-bench COMMAND --help"),
    no_args_is_help=True,
)

for _command, _lines in SUBCOMMANDS.items():
    app.command(_command.__name__, epilog=examples(*_lines))(_command)


def main() -> None:
    """Entry point."""
    run(app)


if __name__ == "__main__":
    main()
