"""rekd-bench: is it fast, is it right, is the rationale the reason?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rekd_deploy.cli import bench_timing
from rekd_deploy.cli.bench_timing import AsJson, Output, finish, line_of_json, progress_bar, show_table
from rekd_train.cli.command import TrustCode, application, examples, run

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
    "rekd-bench report accuracy.json latency.json --title 'Reviews, March'",
)
COMPARE_EXAMPLES = (
    "rekd-bench compare old.json new.json --fail-above 10%",
    "rekd-bench compare main/accuracy.json branch/accuracy.json --fail-points 0.5",
)

Repository = Annotated[
    Path | None, typer.Argument(metavar="REPO", help="Model repository written by rekd-export, run in process.")
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
    url: Annotated[str | None, typer.Option(
        metavar="URL", help="A server in its place: HOST:PORT (gRPC) or http://HOST:PORT."
    )] = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    overrides: Overrides = None,
    split: Split = "test",
    examples: Annotated[
        int | None, typer.Option(min=1, help="The first N examples.", show_default="all")
    ] = None,
    limit: Annotated[float | None, typer.Option(
        min=0.0, metavar="POINTS", show_default="0.5, int8: 1",
        help="Largest gap to the checkpoint's accuracy, in percentage points."
    )] = None,
    single_graph: Annotated[bool, typer.Option("--single-graph", help="Run the graph of both steps.")] = False,
    engine: Annotated[bool, typer.Option("--engine", help="Run the TensorRT engines.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Where REPO runs: cpu, cuda or cuda:N.", show_default="cpu")
    ] = None,
    trust_code: TrustCode = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Measure the served predictions: accuracy given the rationale, rate, curve, classes, calibration.

    A gap to the checkpoint's own accuracy beyond the limit is an error.
    """
    if (repository is None) == (url is None):
        raise typer.BadParameter("give either a repository or --url", param_hint="REPO")
    from rekd_deploy.bench.accuracy import measure_accuracy

    with progress_bar() as progress:
        measured = measure_accuracy(
            repository, url, checkpoint, data, overrides or (), split, examples, limit, single_graph=single_graph,
            engine=engine, device=device, progress=progress,
        )  # fmt: skip
    finish(measured, output, as_json)


def faithfulness(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="Model repository written by rekd-export.")],
    checkpoint: Checkpoint = None,
    data: Data = None,
    overrides: Overrides = None,
    split: Split = "test",
    examples: Annotated[int, typer.Option(min=20, help="The first N examples.")] = 1000,
    judge: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default="CKPT.judge",
        help="Checkpoint of the independent judge; trained and kept there if it is not there yet."
    )] = None,
    judge_epochs: Annotated[float | None, typer.Option(
        min=0.01, help="How long a judge is trained.", show_default="as the predictor's warm start"
    )] = None,
    seed: Annotated[int, typer.Option(help="Of the random masks, the donors and the folds.")] = 0,
    engine: Annotated[bool, typer.Option("--engine", help="Run the TensorRT engines.")] = False,
    device: Annotated[str, typer.Option(help="Of the judges: cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    trust_code: TrustCode = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Test whether the prediction depends on the kept features alone, on their content, and not on their pattern.

    Without --checkpoint what needs a judge is left out.
    """
    from rekd_deploy.bench.faithfulness import measure_faithfulness

    with progress_bar() as progress:
        measured = measure_faithfulness(
            repository, checkpoint, data, overrides or (), split, examples, judge=judge, judge_epochs=judge_epochs,
            seed=seed, engine=engine, device=device, progress=progress,
        )  # fmt: skip
    finish(measured, output, as_json)


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT", help="Result files of rekd-bench, of any kind.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page; the summary lies beside it as .md.")
    ] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading.")] = "What the rationales cost, and what they are worth",
    note: Annotated[list[str] | None, typer.Option(help="A paragraph under the heading.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the last line alone.")] = False,
) -> None:
    """Make one self-contained page and a Markdown summary of results."""
    from rekd_deploy.bench.report import write_report
    from rekd_deploy.bench.results import read_result

    page, markdown = write_report(title, list(map(read_result, results)), output, note or ())
    if not as_json:
        typer.echo(f"page     {page}\nsummary  {markdown}")
    line_of_json({"kind": "report", "page": str(page), "summary": str(markdown), "bytes": page.stat().st_size})


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
    from rekd_deploy.bench import report
    from rekd_deploy.bench.results import read_result
    from rekd_deploy.errors import BenchmarkError

    found = report.compare(read_result(old), read_result(new), _percent(fail_above), fail_points, other_hardware)
    if not as_json:
        show_table("", ("figure", "old", "new", "change", "verdict"), [
            (each.name, f"{each.old:.4g}", f"{each.new:.4g}", f"{each.change:+.1f} {each.unit}", each.outcome)
            for each in found.changes
        ])  # fmt: skip
        notes = {"only in the old": found.only_old, "only in the new": found.only_new, "note": found.notes,
                 "worse": found.worse}  # fmt: skip
        for name, lines in notes.items():
            for line in lines:
                typer.echo(f"{name}: {line}")
    changes = [change._asdict() for change in found.changes]
    line_of_json({"kind": "compare", **found._asdict(), "changes": changes})
    if found.worse:
        raise BenchmarkError(f"worse than {old}: {'; '.join(found.worse)}")


def _percent(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"'{text}' is no percentage; give one as 10%", param_hint="--fail-above")
    return value


SUBCOMMANDS = {
    bench_timing.latency: bench_timing.LATENCY_EXAMPLES, bench_timing.serving: bench_timing.SERVING_EXAMPLES,
    accuracy: ACCURACY_EXAMPLES, faithfulness: FAITHFULNESS_EXAMPLES, report: REPORT_EXAMPLES,
    compare: COMPARE_EXAMPLES,
}  # fmt: skip
"""With lines for --help, in the order of --help."""

app = application(
    help="Measure a served model: what a prediction costs, how good it is, whether the rationale is the reason.\n\n"
    "A table for people, a last line of JSON for machines, and a result file with the hardware and versions. Exit "
    "code 1 if a check fails.",
    epilog=examples(*(lines[0] for lines in SUBCOMMANDS.values()), "rekd-bench COMMAND --help"),
    no_args_is_help=True,
)

for _command, _lines in SUBCOMMANDS.items():
    app.command(_command.__name__, epilog=examples(*_lines))(_command)


def main() -> None:
    """Entry point."""
    run(app, extra="bench")


if __name__ == "__main__":
    main()
