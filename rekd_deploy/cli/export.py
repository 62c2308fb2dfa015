"""rekd-export: a checkpoint -> a verified Triton model repository."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rekd_train.cli.command import TrustCode, application, examples, print_json, run

if TYPE_CHECKING:
    from rekd_deploy.export.options import ExportOptions

_AS_THERE = "if the repository that is there has it"
_WITH_VERIFY = {"verify", "checkpoint", "against", "device", "json"}
_NOT_OF_OPTIONS = {"checkpoint", "output", "tune", "verify", "against", "dry_run", "json"}
"""Parameters that go with --verify, and those that are no fields of ``ExportOptions``."""

app = application(
    help="Export a checkpoint as ONNX graphs, prove them equal to the model, and write a Triton model repository.\n\n"
    "Nothing is written unless the graphs pass the parity gate; an older repository stays until then.",
    epilog=examples(
        "rekd-export runs/demo/student",
        "rekd-export runs/demo/student --dry-run",
        "rekd-export runs/demo/student --output /srv/models --keep 2 --batches 1,8,128",
        "rekd-export runs/demo/student --lengths 64,128,256 --no-text-endpoint",
        "rekd-export runs/demo/student --tune",
        "rekd-export runs/demo/student --precision int8",
        "rekd-export runs/demo/student --parity-texts reviews.jsonl --json",
        "rekd-export --verify /srv/models",
        "rekd-export --verify /srv/models --checkpoint runs/demo/student --device cuda",
    ),
)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of whole numbers like 64,128,256") from None


@app.command()
def export(
    context: typer.Context,
    checkpoint: Annotated[Path | None, typer.Argument(
        metavar="CKPT", help="Checkpoint directory written by rekd-train."
    )] = None,
    output: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default="./model_repository/<target>", help="Repository to write."
    )] = None,
    target: Annotated[str, typer.Option(
        help="Triton backend that runs the graphs: python, onnxruntime or tensorrt."
    )] = "python",
    engine: Annotated[str | None, typer.Option(
        show_default="ONNX Runtime", help="Build engines for the python backend: tensorrt-rtx."
    )] = None,
    gpu: Annotated[bool | None, typer.Option(
        "--gpu/--cpu", show_default="cpu; onnxruntime: as this machine", help="Where ONNX Runtime runs."
    )] = None,
    lengths: Annotated[str | None, typer.Option(
        metavar="N,N,...", show_default="the checkpoint's", parser=_numbers,
        help="Tokens that texts are padded to, ascending; the model's limit is always one.",
    )] = None,
    batches: Annotated[str | None, typer.Option(
        metavar="N,N,...", show_default="8,16,32,64", parser=_numbers,
        help="Batch sizes the server aims at; the largest is the most in one request.",
    )] = None,
    instances: Annotated[int | None, typer.Option(
        min=1, metavar="N", show_default="2 on CPUs with several cores, else 1",
        help="Instances of each component model, on every GPU that is used.",
    )] = None,
    threads: Annotated[int, typer.Option(
        min=0, metavar="N", help="Threads of an instance; 0: a share of the cores, half at most."
    )] = 0,
    queue_delay: Annotated[int | None, typer.Option(
        min=0, metavar="N", show_default="100 on GPUs, else 0",
        help="Microseconds that a request may wait for others to form a batch of --batches.",
    )] = None,
    gpus: Annotated[str | None, typer.Option(
        metavar="N,N,...", show_default="all there are", parser=_numbers, help="Numbers of the GPUs to run on."
    )] = None,
    rate_limit: Annotated[bool, typer.Option(
        "--rate-limit", help="Each execution takes one of the server's resource 'rekd'."
    )] = False,
    single_graph: Annotated[bool | None, typer.Option(
        show_default=f"without engines, or {_AS_THERE}", help="Add the model rekd_single: both steps in one graph."
    )] = None,
    fused: Annotated[bool, typer.Option(
        "--fuse/--no-fuse", help="Fuse attention and its neighbours for ONNX Runtime."
    )] = True,
    text_endpoint: Annotated[bool | None, typer.Option(
        "--text-endpoint/--no-text-endpoint", "--image-endpoint/--no-image-endpoint", show_default=_AS_THERE,
        help="Add the model rekd_text (rekd_image): raw text (a JPEG or PNG) in, spans out.",
    )] = None,
    precision: Annotated[str | None, typer.Option(
        show_default="fp16 where ONNX Runtime runs on GPUs, else fp32",
        help="What the graphs compute in: fp32, fp16 or int8; the decision stays fp32.",
    )] = None,
    keep: Annotated[int, typer.Option(
        min=1, metavar="N", help="Versions that stay in the repository, the new one included."
    )] = 1,
    parity_texts: Annotated[Path | None, typer.Option(
        metavar="FILE", show_default="the checkpoint's own examples",
        help='Real texts for the parity gate: .jsonl (key "text") or .txt (one a line).',
    )] = None,
    verify: Annotated[Path | None, typer.Option(
        metavar="DIR", help="In place of CKPT: check an existing repository again."
    )] = None,
    against: Annotated[Path | None, typer.Option(
        "--checkpoint", metavar="CKPT", help="With --verify: run the parity gate against this checkpoint, too."
    )] = None,
    device: Annotated[str | None, typer.Option(
        metavar="DEVICE", show_default="where they will be served, if that is here; cpu with --verify",
        help="Where the graphs are proved: cpu, cuda or cuda:N.",
    )] = None,
    tune: Annotated[bool, typer.Option(
        "--tune", help="Choose --instances and --threads by measuring on this machine, as it will serve; a minute."
    )] = False,
    trust_code: TrustCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    from rekd_deploy.export.options import ExportOptions
    from rekd_train.errors import ConfigError

    if (checkpoint is None) == (verify is None):
        reason = "Missing argument" if checkpoint is None else "both given"
        raise typer.BadParameter(f"{reason}: give either a checkpoint or --verify DIR", param_hint="CKPT")
    if verify is not None:
        given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
        if others := ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given - _WITH_VERIFY)):
            raise typer.BadParameter(f"{others} does not go with it", param_hint="--verify")
        _verify(verify, against, device or "cpu", json)
        return
    if against is not None:
        raise typer.BadParameter("it goes with --verify", param_hint="--checkpoint")
    chosen = {name: value for name, value in context.params.items() if name not in _NOT_OF_OPTIONS}
    lists = {name: chosen[name] or () for name in ("lengths", "batches", "gpus")}
    try:
        options = ExportOptions(**chosen | lists)
        if tune:
            from rekd_deploy.tuning.tune import check_tunable

            check_tunable(options)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    root = output or Path("model_repository") / target
    if dry_run:
        _show_plan(checkpoint, root, options, json)
    else:
        _publish(checkpoint, root, options, tune, json)


def _verify(root: Path, checkpoint: Path | None, device: str, json: bool) -> None:
    from rich.console import Console

    from rekd_deploy.cli.export_summary import verification_lines
    from rekd_deploy.export.verify import verify

    with Console(stderr=True).status("files") as status:
        verification = verify(root, checkpoint=checkpoint, device=device, report=status.update)
    if json:
        print_json(verification.to_dict())
    else:
        print(*verification_lines(verification), sep="\n")


def _show_plan(checkpoint: Path, root: Path, options: ExportOptions, json: bool) -> None:
    from rekd_deploy.cli.export_summary import plan_lines
    from rekd_deploy.export.checkpoint import gate_device, proof_elsewhere
    from rekd_deploy.export.run import plan_export

    plan = plan_export(checkpoint, root, options)
    device, reason = gate_device(plan.options)
    if json:
        print_json({"dry_run": True, **plan.to_dict(), "gate_device": device, "not_proved_there": reason})
    else:
        gate = proof_elsewhere(reason, root) if reason else f"on {device}"
        print(*plan_lines(plan), f"{'gate':<12}{gate}", "nothing was written (--dry-run)", sep="\n")


def _publish(checkpoint: Path, root: Path, options: ExportOptions, tuned: bool, json: bool) -> None:
    from rich.console import Console

    from rekd_deploy.cli.export_summary import kept_note, summary
    from rekd_deploy.export.checkpoint import proof_elsewhere
    from rekd_deploy.export.run import publish

    with Console(stderr=True).status("load") as status:
        chooser = None
        if tuned:
            from rekd_deploy.tuning.tune import tune

            chooser = partial(tune, report=status.update)
        publication = publish(checkpoint, root, options=options, report=status.update, tune=chooser)
    if publication.not_proved_there:
        print(f"warning: {proof_elsewhere(publication.not_proved_there, root)}", file=sys.stderr)
    if kept := publication.plan.kept:
        print(f"warning: exported, too: {kept_note(kept)}", file=sys.stderr)
    if json:
        print_json(publication.to_dict())
    else:
        Console(highlight=False).print(*summary(publication), sep="\n")


def main() -> None:
    run(app, extra="export")


if __name__ == "__main__":
    main()
