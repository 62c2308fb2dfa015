"""rekd-train: run, presets, calibrate, record, check-teacher, compact, evaluate, import-official."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rekd_train.cli.command import TrustCode, application, examples, finite, print_json, print_table, progress_bars, run

app = application(
    help="Train pairs that classify from their own rationale, alone or distilled from a teacher pair.",
    epilog=examples(
        "rekd-train presets", "rekd-train run demo_student --output runs/student", "rekd-train COMMAND --help"),
    no_args_is_help=True,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory of the new checkpoint.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint directory.")]
Teacher = Annotated[Path | None, typer.Option(metavar="CKPT|FILE", help="Checkpoint or knowledge to learn from.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")]
_DATA = "Take the data of these settings, or this table, not the recorded ones."
Data = Annotated[str | None, typer.Option(metavar="PRESET|FILE", help=_DATA)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at the output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def command(*lines: str, name: str | None = None):
    """Of ``app``, with examples of its use."""
    return app.command(name, epilog=examples(*lines))


def _warn_of_classes(never: dict[str, list[str]]) -> None:
    """A line wherever classes are predicted for no example; ``never``: those classes by what was measured."""
    for measured, names in never.items():
        if names:
            typer.echo(f"warning: on {measured} no example is predicted as {', '.join(names)}; fix: --set "
                       "data.class_weights=balanced, --set stages.best_metric=macro_f1, or more examples")


def _report(metrics: dict, path: Path, as_json: bool) -> None:
    """Print what a run has measured, by split."""
    if not metrics:  # of several processes, one reports
        return
    if as_json:
        print_json({"checkpoint": str(path), **metrics})
        return
    from rekd_train.evaluation.report import shown

    never = {split: figures["never_predicted"] for split, figures in metrics.items()}
    keys = [key for key in next(iter(metrics.values())) if key != "never_predicted" or any(never.values())]
    typer.echo(f"{path} (noise-free, by the stored policy)")  # not as the table's title, which would be folded
    print_table(("figure", *metrics), [(key, *(shown(figures[key]) for figures in metrics.values())) for key in keys])
    _warn_of_classes(never)


@command("rekd-train run demo_student --output runs/student",
         "rekd-train run demo_student --teacher runs/teacher --output runs/distilled",
         "rekd-train run mine.toml --set stages.rationale_epochs=3 --set seed=1 --output runs/mine",
         "rekd-train run mine.toml --output runs/mine --resume", name="run")
def run_command(
    source: Annotated[str, typer.Argument(metavar="PRESET|FILE.toml", help="A preset's name or a configuration file.")],
    output: Output, teacher: Teacher = None,
    warm_start: Annotated[Path | None, typer.Option(
        metavar="CKPT", help="Start from this checkpoint's weights; no classifier stage.")] = None,
    half: Annotated[Literal["selector", "predictor"] | None, typer.Option(
        help="Of --warm-start's two halves this alone.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(
        "--resume", help="Go on where an interrupted run of the same settings was saved last.")] = False,
    overwrite: Annotated[bool, typer.Option(
        "--overwrite", help="Replace a checkpoint at the output, or an unfinished run beside it.")] = False,
    trust_code: TrustCode = False, device: Device = "auto",
    tensorboard: Annotated[bool, typer.Option(
        "--tensorboard", help="Also log for TensorBoard, into OUTPUT.training.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train by a preset or a configuration file and write a checkpoint.

    The log, and the state that --resume reads, lie in OUTPUT.training. Under accelerate launch or torchrun several
    processes share every batch.
    """
    from rekd_train.config.run import run_config

    config = run_config(source, overrides or [])
    from rekd_train.runs import train_run

    with progress_bars() as observer:
        metrics = train_run(
            config, output, teacher=teacher, warm_start=warm_start, half=half, observer=observer, resume=resume,
            overwrite=overwrite, device=device, tensorboard=tensorboard)
    _report(metrics, output, as_json)


@command("rekd-train presets", "rekd-train presets paper --json")
def presets(
    contains: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only presets whose name contains this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print every setting as one JSON document.")] = False,
) -> None:
    """List the presets and where their settings come from."""
    from rekd_train.config.run import preset, preset_names

    configs = {name: preset(name) for name in preset_names() if contains in name}
    if as_json:
        print_json({name: config.model_dump() for name, config in configs.items()})
        return
    if not configs:
        raise typer.BadParameter(f"no preset has '{contains}' in its name", param_hint="TEXT")
    rows = [(name, config.source) for name, config in configs.items()]
    print_table(("preset", "where its settings come from"), rows, left=2, framed=False)


@command("rekd-train calibrate runs/student --target 0.08 --output runs/student-8",
         "rekd-train calibrate imported --data paper_imdb_bert_small_re --set data.path=aclImdb --output calibrated")
def calibrate(
    path: Checkpoint, output: Output,
    target: Annotated[float | None, typer.Option(help="Mean share of kept features; default: the run's own.")] = None,
    data: Data = None, overrides: Overrides = None, overwrite: Overwrite = False, trust_code: TrustCode = False,
    device: Device = "auto", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Fit the decision rule's bias and the probability temperature on dev again."""
    from rekd_train.runs import calibrate_run

    metrics = calibrate_run(path, output, target, device, data=data, overrides=overrides or [], overwrite=overwrite)
    _report(metrics, output, as_json)


@command("rekd-train record runs/teacher --output knowledge.parquet",
         "rekd-train run demo_student --teacher knowledge.parquet --output runs/student")
def record(
    path: Checkpoint, output: Annotated[Path, typer.Option("--output", "-o", help="The Parquet file to write.")],
    data: Data = None, overrides: Overrides = None,
    texts: Annotated[bool, typer.Option("--texts", help="Write the texts, too, not their hashes alone.")] = False,
    sentences: Annotated[int, typer.Option(
        min=0, help="Also what it says about so many short sentences of each text; students read them, too.")] = 0,
    passages: Annotated[bool, typer.Option(
        "--passages", help="Also what it says about what follows the first 180 words of each text.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file at the output.")] = False,
    trust_code: TrustCode = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Write what a pair says about its training texts or images, to teach from without it."""
    from rekd_train.runs import record_run

    count = record_run(path, output, device=device, data=data, overrides=overrides or [], texts=texts,
                       sentences=sentences, passages=passages, overwrite=overwrite)
    typer.echo(f"{output}: {count:,} examples, {output.stat().st_size / 1e6:.1f} MB")


@command("rekd-train check-teacher knowledge.jsonl --data my.csv", name="check-teacher")
def check_teacher_command(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Recorded knowledge, JSON lines or Parquet.")],
    data: Annotated[str, typer.Option(metavar="PRESET|FILE", help="The data that it is to teach.")],
    overrides: Overrides = None, as_json: AsJson = False,
) -> None:
    """Count what a file of recorded knowledge can teach, and what is wrong with it."""
    from rekd_train.config.run import run_config
    from rekd_train.runs import check_knowledge

    own = [] if Path(data).suffix in ("", ".toml") else ["data.name=table", f"data.path={data}"]
    found = check_knowledge(path, run_config("demo_student" if own else data, [*own, *(overrides or [])]).data)
    if as_json:
        print_json(found)
        return
    shown = {name: f"{value:.1%}" if isinstance(value, float) else value for name, value in found.items()}
    rows = [(name.replace("_", " "), "" if value is None else str(value)) for name, value in shown.items()]
    print_table(("knowledge", "value"), rows, left=1)


@command("rekd-train compact runs/student --output runs/student-compact",
         "rekd-train compact calibrated --set stages.compact_epochs=2 --output compacted")
def compact(
    path: Checkpoint, output: Output,
    teacher: Annotated[Path | None, typer.Option(metavar="CKPT", help="Checkpoint to learn from.")] = None,
    data: Data = None, overrides: Overrides = None, overwrite: Overwrite = False, trust_code: TrustCode = False,
    device: Device = "auto", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Fine-tune the predictor on gathered tokens, selector frozen, so that it can be served compacted."""
    from rekd_train.runs import compact_run

    with progress_bars() as observer:
        metrics = compact_run(
            path, output, teacher=teacher, observer=observer, device=device, data=data, overrides=overrides or [],
            overwrite=overwrite)
    _report(metrics, output, as_json)


@command("rekd-train evaluate runs/student", "rekd-train evaluate runs/student --split dev --draws 0 --json",
         "rekd-train evaluate runs/student --data new_reviews.csv",
         "rekd-train evaluate runs/student --teacher runs/teacher --output student.json")
def evaluate(
    path: Checkpoint,
    split: Annotated[str | None, typer.Option(
        help="train, dev or test; default: test, of a new file without splits every row.")] = None,
    draws: Annotated[int, typer.Option(min=0, help="Sampled rationales of each example; below 2: none.")] = 10,
    teacher: Annotated[Path | None, typer.Option(
        metavar="CKPT", help="Checkpoint whose rationales to compare with.")] = None,
    risk: Annotated[float, typer.Option(
        min=0.0, max=1.0, help="Share of wrong answers that the abstain threshold allows.")] = 0.05,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", metavar="FILE", help="Write the report there, as JSON.")] = None,
    data: Data = None, overrides: Overrides = None, trust_code: TrustCode = False, device: Device = "auto",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure a checkpoint on a split of its data: accuracy given the rationale, rate, calibration, every mode."""
    from rekd_train.data import SPLITS

    if split not in (None, *SPLITS):
        raise typer.BadParameter(f"'{split}' is none of {', '.join(SPLITS)}", param_hint="--split")
    from rekd_train.files import write_json
    from rekd_train.runs import evaluate_run

    report = evaluate_run(path, split, draws=draws, teacher=teacher, risk=risk, device=device, data=data,
                          overrides=overrides or [])
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, finite(report))
    if as_json:
        print_json(report)
        return
    from rekd_train.evaluation.report import report_rows

    typer.echo(f"{path}, {report['examples']} examples, {report['measured']}; noise-free unless said otherwise")
    rows, previous = [], None
    for section, figure, value in report_rows(report):
        rows.append(("" if section == previous else section, figure, value))
        previous = section
    print_table(("section", "figure", "value"), rows, left=2)
    _warn_of_classes({report["measured"]: report["classification"]["never_predicted"]})


@command("rekd-train import-official --family bert --selector g_bert --predictor f_bert --backbone bert-small "
         "--labels negative,positive --output runs/official",
         name="import-official")
def import_official(
    family: Annotated[str, typer.Option(help="bert or vit.")],
    selector: Annotated[Path, typer.Option(metavar="FILE", help="Their generator's file, g_...")],
    predictor: Annotated[Path, typer.Option(metavar="FILE", help="Their encoder's file, f_...")],
    backbone: Annotated[Path, typer.Option(metavar="DIR", help="The pretrained model both started from.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CKPT", help="Directory of the new checkpoint.")],
    tokenizer: Annotated[Path | None, typer.Option(
        metavar="FILE|DIR", help="tokenizer.json or vocab.txt; default: the backbone's.")] = None,
    labels: Annotated[str, typer.Option(metavar="A,B,...", help="Class names, in the order of the logits.")] = "",
    max_length: Annotated[int, typer.Option(min=3, help="Tokens a text is cut to (bert).")] = 256,
    image_side: Annotated[int, typer.Option(min=1, help="Height and width of the images as they come (vit).")] = 32,
    overwrite: Overwrite = False,
) -> None:
    """Make a checkpoint of a pair that the authors' code has trained.

    It answers as theirs does without its noise. Then: rekd-train calibrate and compact, with --data, make it one
    that serves a fixed budget and computes on the kept features alone.
    """
    from rekd_train.checkpoints.checkpoint import load
    from rekd_train.checkpoints.official import import_official as convert

    names = [name.strip() for name in labels.split(",")] if labels else None
    convert(family, selector, predictor, backbone, output, tokenizer=tokenizer, labels=names, max_length=max_length,
            image_side=image_side, overwrite=overwrite)
    pair = load(output)
    kind, classes = pair.preprocessor.settings.kind, ", ".join(pair.labels)
    typer.echo(f"{output}: reads {kind}s, {len(pair.labels)} classes: {classes}")


def main() -> None:
    """Entry point."""
    run(app, extra="train")
