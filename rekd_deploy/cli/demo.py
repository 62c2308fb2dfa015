"""make demo, make demo-images: the whole chain, with a short report at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rekd_train.cli.command import application, examples, run

if TYPE_CHECKING:
    from rich.table import Table

    from rekd_deploy.cli.demo_chain import Demo, Subject

_SHORT = 600
"""Characters of the reviews that are shown, if there are enough of them."""

app = application(
    help="Train, distil, export, serve, query and time on real movie reviews or images; finished stages are reused.",
    epilog=examples(
        "python -m rekd_deploy.cli.demo --output runs/demo",
        "python -m rekd_deploy.cli.demo --images --output runs/demo-images",
    ),
)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything goes.")] = Path("runs/demo"),
    images: Annotated[bool, typer.Option("--images", help="Fashion-MNIST in place of movie reviews.")] = False,
    queries: Annotated[int, typer.Option(min=5, help="Held-out examples sent through the server.")] = 200,
    overrides: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE", help="Change the presets."
    )] = None,
) -> None:
    from rekd_deploy.cli.demo_chain import IMAGES, REVIEWS, Demo, Stages, run_demo
    from rekd_train.cli.main import progress_bars

    settings = Demo(output, queries, tuple(overrides or ()), IMAGES if images else REVIEWS)

    def announce(name: str, reused: bool) -> None:
        typer.echo(f"{'reused ' if reused else 'running'}  {name.replace('_', ' ')}", err=True)

    with progress_bars() as observer:
        _show(settings, run_demo(settings, Stages(output, announce), observer))


def _show(settings: Demo, report: dict[str, Any]) -> None:
    from rich.console import Console

    from rekd_deploy.cli.demo_chain import served_predictions
    from rekd_deploy.client.render import plain_text, shows_colours, terminal_text

    console = Console(highlight=False, markup=False, emoji=False)
    show = terminal_text if shows_colours(console) else plain_text
    predictions = served_predictions(settings)
    short = [prediction for prediction in predictions if len(prediction.text) <= _SHORT]
    for prediction in [*short, *predictions][:5]:
        console.print(show(prediction), end="\n\n", soft_wrap=True)
    subject = settings.subject
    console.print(_table(report, subject))
    query = report["query"]
    console.print(
        f"{query['n']} {subject.items} through Triton: p50 {query['p50_ms']:.1f} ms a query; answers equal to the "
        f"in-process pipeline {query['agree_pipeline']}/{query['n']}, to PyTorch {query['agree_torch']}/{query['n']}"
    )
    root, command = settings.root, "rekd-query --image FILE.png"
    if subject.items == "reviews":
        command = 'rekd-query "A warm and moving film with wonderful performances from the whole cast."'
    for line in (
        f"Training, export and queries took {sum(report['seconds'].values()):.0f} s.",
        f"Report {root}/report.json · checkpoint {root}/student · repository {root}/model_repository",
        f"Next: rekd-serve {root}/model_repository   and in another terminal   {command}",
    ):
        console.print(line, soft_wrap=True)


def _table(report: dict[str, Any], subject: Subject) -> Table:
    """What the pair costs and gives beside the classifier that it replaces."""
    from rich.table import Table

    from rekd_deploy.bench.variants import CLASSIFIER, COMPACTED
    from rekd_deploy.cli.demo_chain import BATCHES, MODELS

    times = report["milliseconds"]
    title = f"Held-out test {subject.items}, noise-free; ONNX Runtime, {times['length']} positions"
    table = Table(title=title, box=None)
    for name in ("", "accuracy", f"{subject.features} kept", *(f"ms, batch {batch}" for batch in BATCHES)):
        table.add_column(name, justify="right" if name else "left")
    for name in MODELS:
        model = {"teacher": None, "classifier": CLASSIFIER}.get(name, COMPACTED)
        spent = [f"{times[str(batch)][model]:.2f}" if model else "" for batch in BATCHES]
        found = report[name]
        table.add_row(name.replace("_", " "), f"{found['accuracy']:.3f}", f"{found['rate']:.1%}", *spent)
    return table


if __name__ == "__main__":
    run(app, extra="demo")
