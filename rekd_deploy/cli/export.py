"""rekd-export: a checkpoint -> a verified Triton model repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rekd_train.command import application, examples, print_json, run

if TYPE_CHECKING:
    from rekd_deploy.publish import Publication

_STEPS = {
    "load": "reading the checkpoint",
    "selector": "exporting the selector",
    "predictor": "exporting the predictor",
    "single": "joining both steps",
    "parity": "comparing the graphs with the model",
    "repository": "writing the repository",
}

app = application(
    help="Export a checkpoint as ONNX graphs, prove them equal to the model, and write a Triton model repository.\n\n"
    "Nothing is written unless the graphs pass the parity gate; an older repository stays until then.",
    epilog=examples(
        "rekd-export runs/demo/student",
        "rekd-export runs/demo/student --output /srv/models --max-batch-size 128",
        "rekd-export runs/demo/student --parity-texts reviews.jsonl --json",
        "rekd-export runs/demo/student --single-graph",
    ),
)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint directory written by rekd-train.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Repository to write.", show_default="./model_repository/<target>", metavar="DIR"),
    ] = None,
    target: Annotated[str, typer.Option(help="Triton backend that runs the graphs: python.")] = "python",
    max_batch_size: Annotated[int, typer.Option(min=1, help="Most texts or images in one request.")] = 64,
    single_graph: Annotated[
        bool, typer.Option("--single-graph", help="Add the model rekd_single: both steps in one graph.")
    ] = False,
    fuse: Annotated[
        bool, typer.Option("--fuse/--no-fuse", help="Fuse attention and its neighbours for ONNX Runtime.")
    ] = True,
    parity_texts: Annotated[
        Path | None,
        typer.Option(
            help='Real texts for the parity gate: .jsonl (key "text") or .txt (one a line).',
            show_default="the checkpoint's own examples",
            metavar="FILE",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    from rekd_deploy.triton_config import TARGETS

    if target not in TARGETS:
        raise typer.BadParameter(f"'{target}' is not one of {', '.join(TARGETS)}", param_hint="--target")
    from rich.console import Console

    from rekd_deploy.publish import publish

    progress = Console(stderr=True)
    with progress.status(_STEPS["load"]) as status:
        publication = publish(
            checkpoint,
            output or Path("model_repository") / target,
            target=target,
            max_batch_size=max_batch_size,
            single_graph=single_graph,
            fused=fuse,
            parity_texts=parity_texts,
            report=lambda step: status.update(_STEPS[step]),
        )
    if json:
        print_json(publication.to_dict())
    else:
        Console(highlight=False).print(*_summary(publication), sep="\n")


def _summary(publication: Publication) -> list[Any]:
    from rich.table import Table

    manifest, parity, seconds = publication.manifest, publication.manifest["parity"], publication.seconds
    table = Table("artefact", "size", "precision", "parity with the PyTorch model", "seconds")
    findings = {
        "selector": [
            f"scores within {parity['score_difference']:.1e} (limit {parity['limits']['scores']:.0e})",
            f"{parity['flipped_positions']} of {parity['positions']} positions flipped, "
            f"{parity['near_ties']} of them near-ties",
        ],
        "predictor": [
            f"logits within {parity['logit_difference']:.1e} (limit {parity['limits']['logits']:.0e})",
            f"probabilities within {parity['probability_difference']:.1e}",
        ],
    }
    if "single" in manifest["artefacts"]:
        single = manifest["single_parity"]
        findings["single"] = [
            f"scores within {single['score_difference']:.1e}, logits within {single['logit_difference']:.1e}"
        ]
    for role, entry in manifest["artefacts"].items():
        table.add_row(
            f"{role}.onnx", _size(entry["bytes"]), entry["precision"], "\n".join(findings[role]), f"{seconds[role]:.1f}"
        )
    origin = {"file": "given", "checkpoint": "from the checkpoint", "generated": "made up"}
    return [
        table,
        f"parity: {parity['examples']} examples {origin[parity['source']]}, "
        f"{parity['constructed_rows']} constructed rows, {seconds['parity']:.1f} s",
        f"repository: {publication.root}",
    ]


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
