"""Rationales of patches on Fashion-MNIST, and on mosaics where the right ones are known.

Resumable as ``imdb_table.py`` is: finished cells are skipped.

    python benchmarks/fashion_table.py --part fashion
    python benchmarks/fashion_table.py --part mosaic_3x3 --jobs 3 --device cuda
    python benchmarks/fashion_table.py --part fashion --size cpu --seeds 2026
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the code whose hash is recorded is the code that runs

import typer
from _recipes import (
    COMPARISONS,
    MOSAIC_COMPARISONS,
    distillation_cells,
    distillation_rows,
    mosaic_cells,
    mosaic_rows,
    run_table,
    seeds_of,
)
from _tables import accuracy_table, comparison_table, modes_table, provenance, truth_table

from rekd_train.cli.command import application, examples, run
from rekd_train.config.run import run_config

RESULTS = Path(__file__).parent / "results" / "fashion_table"

PARTS = {
    "fashion": "Fashion-MNIST, ViT from scratch on 4 x 4 patches",
    "mosaic_2x2": "Mosaics of 2 x 2 tiles: one Fashion-MNIST item among shuffled ones",
    "mosaic_3x3": "Mosaics of 3 x 3 tiles: one Fashion-MNIST item among shuffled ones",
}
SIZES = {
    "full": (),
    "cpu": ("data.train_examples=20000", "stages.classifier_epochs=4", "stages.rationale_epochs=3",
            "stages.compact_epochs=2"),
}  # fmt: skip
"""What is changed in the presets."""

Part = Enum("Part", {name: name for name in PARTS}, type=str)
Size = Enum("Size", {name: name for name in SIZES}, type=str)

app = application(
    help="Train and measure every cell of a Fashion-MNIST table that is not finished, and write the table.",
    epilog=examples("fashion_table.py --part fashion", "fashion_table.py --part mosaic_3x3 --jobs 3 --device cuda"),
)


@app.command()
def fashion_table(
    part: Annotated[Part, typer.Option(help="Which data.")] = Part.fashion,
    size: Annotated[Size, typer.Option(help="full: as the presets say; cpu: fewer images and epochs.")] = Size.full,
    seeds: Annotated[str, typer.Option(help="Of weights, order and noise.")] = "2026,2027,2028",
    jobs: Annotated[int, typer.Option(min=1, help="Cells side by side, each a process.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    draws: Annotated[int, typer.Option(min=0, help="Sampled rationales of each test image.")] = 10,
    teacher_seed: Annotated[
        int | None, typer.Option(help="Every student learns from this seed's teacher.", show_default="its own")
    ] = None,
    only: Annotated[str, typer.Option(help="Names of cells, with commas; what they need comes along.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change every configuration.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the result files and the table.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("runs/fashion_table"),
    table_only: Annotated[bool, typer.Option("--table-only", help="Train nothing, write the table.")] = False,
    any_code: Annotated[
        bool, typer.Option("--any-code", help="Cells that an older state of the code has finished are finished.")
    ] = False,
) -> None:
    """Train and measure every cell of a Fashion-MNIST table that is not finished, and write the table."""
    changes = [*SIZES[size.value], *(overrides or [])]
    if part.value == "fashion":
        names = ("fashion_student", "fashion_teacher", "fashion_unequal")
        student, teacher, unequal = (run_config(name, changes) for name in names)
        if teacher_seed not in (None, *seeds_of(seeds)):
            raise typer.BadParameter(f"{teacher_seed} is none of --seeds {seeds}", param_hint="--teacher-seed")
        ordered = sorted(seeds_of(seeds), key=lambda seed: seed != teacher_seed)  # what is needed comes first
        cells = [
            cell for seed in ordered for cell in distillation_cells(student, teacher, seed, unequal, teacher_seed)
        ]
        rows, comparisons = distillation_rows(student, teacher, "patches", unequal), COMPARISONS
    else:
        config = run_config(part.value, changes)
        cells = [cell for seed in seeds_of(seeds) for cell in mosaic_cells(config, seed)]
        rows, comparisons = mosaic_rows(config), MOSAIC_COMPARISONS
    options = [f"--part {part.value}", f"--size {size.value}", f"--seeds {seeds}", f"--draws {draws}"]
    options += [f"--teacher-seed {teacher_seed}"] if teacher_seed is not None else []
    options += [f"--set {value}" for value in overrides or []]

    def render(found) -> list[str]:
        truth = truth_table(found, rows)
        return [
            f"# {PARTS[part.value]}",
            "",
            "Test images, noise-free by the stored rule, bias fitted on dev; mean ± standard deviation over seeds.",
            "",
            *accuracy_table(found, rows),
            *(["", "## Where the rationales lie", "", *truth] if part.value != "fashion" else []),
            "",
            "## Differences",
            "",
            *comparison_table(found, comparisons),
            "",
            "## Other ways to decide, and the teacher",
            "",
            *modes_table(found, rows),
            "",
            "## How it was made",
            "",
            *provenance(found, f"python benchmarks/fashion_table.py {' '.join(options)}"),
        ]

    name = part.value if size is Size.full else f"{part.value}_{size.value}"
    run_table(
        cells, render, results=results / name, work=work / name, jobs=jobs, device=device, draws=draws,
        only=only, table_only=table_only, any_code=any_code,
    )  # fmt: skip


if __name__ == "__main__":
    run(app)
