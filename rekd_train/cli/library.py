"""rekd-train's commands for what is there already: presets, and the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rekd_train.cli.command import print_json


def presets(
    contains: Annotated[str, typer.Argument(metavar="[TEXT]", help="Only presets whose name contains this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print every setting as one JSON document.")] = False,
) -> None:
    """List the presets and where their settings come from."""
    from rekd_train.config.run import preset_names, run_config

    configs = {name: run_config(name) for name in preset_names() if contains in name}
    if as_json:
        print_json({name: config.model_dump() for name, config in configs.items()})
        return
    if not configs:
        raise typer.BadParameter(f"no preset has '{contains}' in its name", param_hint="TEXT")
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("preset", no_wrap=True)
    table.add_column("where its settings come from")
    for name, config in configs.items():
        table.add_row(name, config.source)
    Console().print(table)


def import_official(
    family: Annotated[str, typer.Option(help="bert or vit.")],
    selector: Annotated[Path, typer.Option(metavar="FILE", help="Their generator's file, g_...")],
    predictor: Annotated[Path, typer.Option(metavar="FILE", help="Their encoder's file, f_...")],
    backbone: Annotated[Path, typer.Option(metavar="DIR", help="The pretrained model both started from.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CKPT", help="Directory of the new checkpoint.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="tokenizer.json or vocab.txt; default: the backbone's.")
    ] = None,
    labels: Annotated[str, typer.Option(metavar="A,B,...", help="Class names, in the order of the logits.")] = "",
    max_length: Annotated[int, typer.Option(min=3, help="Tokens a text is cut to (bert).")] = 256,
    image_side: Annotated[int, typer.Option(min=1, help="Height and width of the images as they come (vit).")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at the output.")] = False,
) -> None:
    """Make a checkpoint of a pair that the authors' code has trained.

    It answers as theirs does without its noise. Then: rekd-train calibrate and compact, with --data, make it one
    that serves a fixed budget and computes on the kept features alone.
    """
    from rekd_train.checkpoints.checkpoint import load
    from rekd_train.checkpoints.official import import_official as convert

    names = [name.strip() for name in labels.split(",")] if labels else None
    convert(
        family, selector, predictor, backbone, output,
        tokenizer=tokenizer, labels=names, max_length=max_length, image_side=image_side,
        overwrite=overwrite,
    )  # fmt: skip
    pair = load(output)
    kind = pair.preprocessor.settings.kind.replace("_", " ")
    typer.echo(f"{output}: reads {kind}, {len(pair.labels)} classes: {', '.join(pair.labels)}")
