"""Does distillation help on IMDB, by how much beyond chance, and what does the rationale cost?

A resumable table: every cell is one model of one seed; finished cells are skipped as long as the training code and
their configuration stay as they were. Interrupt it and start it again.

    python benchmarks/imdb_table.py --size cpu
    python benchmarks/imdb_table.py --size minilm --jobs 3 --device cuda
    python benchmarks/imdb_table.py --size gpu --only rekd,re --seeds 2026
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the code whose hash is recorded is the code that runs

import typer
from _recipes import COMPARISONS, distillation_cells, distillation_rows, run_table, seeds_of
from _tables import accuracy_table, comparison_table, modes_table, provenance

from rekd_train.cli.command import application, examples, run
from rekd_train.config.run import run_config

RESULTS = Path(__file__).parent / "results" / "imdb_table"

AT_A_MEAN_RATE = "selection.decision=calibrated"
"""The tables compare at a mean rate, as the paper does; the presets decide by an exact number of words."""
SIZES = {
    "cpu": ("equal_student", "demo_teacher", (
        "data.train_examples=10000", "data.max_length=160", AT_A_MEAN_RATE,
    ), ()),
    "few": ("equal_student", "demo_teacher", ("data.max_length=160", AT_A_MEAN_RATE), (
        "data.train_examples=2000", "stages.classifier_epochs=4", "stages.rationale_epochs=3",
        "stages.compact_epochs=2",
    )),
    "gpu": ("equal_student", "demo_teacher", (
        "data.train_examples=20000", "data.max_length=256", AT_A_MEAN_RATE,
    ), ()),
    "minilm": ("minilm_student", "minilm_teacher", (), ()),
}  # fmt: skip
"""Presets of student and teacher, what is changed in both, and what in the student alone."""

TITLES = {
    "cpu": "IMDB, 2 layers x 128 from scratch, 10,000 reviews of 160 tokens",
    "few": "IMDB, 2 layers x 128 from scratch, 2,000 reviews of 160 tokens; the teacher has read 10,000",
    "gpu": "IMDB, 2 layers x 128 from scratch, 20,000 reviews of 256 tokens",
    "minilm": "IMDB, MiniLM-L6 teaches its first two layers, 20,000 reviews of 256 tokens",
}

Size = Enum("Size", {name: name for name in SIZES}, type=str)

app = application(
    help="Train and measure every cell of the IMDB table that is not finished, and write the table.",
    epilog=examples("imdb_table.py --size cpu", "imdb_table.py --size minilm --jobs 3 --device cuda"),
)


@app.command()
def imdb_table(
    size: Annotated[Size, typer.Option(help="Which models and how much data.")] = Size.cpu,
    seeds: Annotated[str, typer.Option(help="Of weights, order and noise.")] = "2026,2027,2028",
    jobs: Annotated[int, typer.Option(min=1, help="Cells side by side, each a process.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    draws: Annotated[int, typer.Option(min=0, help="Sampled rationales of each test review.")] = 10,
    teacher_seed: Annotated[
        int | None, typer.Option(help="Every student learns from this seed's teacher.", show_default="its own")
    ] = None,
    only: Annotated[str, typer.Option(help="Names of cells, with commas; what they need comes along.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change both configurations.")
    ] = None,
    student_overrides: Annotated[
        list[str] | None, typer.Option("--set-student", metavar="KEY=VALUE", help="Change the student's alone.")
    ] = None,
    teacher_overrides: Annotated[
        list[str] | None, typer.Option("--set-teacher", metavar="KEY=VALUE", help="Change the teacher's alone.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the result files and the table.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("runs/imdb_table"),
    table_only: Annotated[bool, typer.Option("--table-only", help="Train nothing, write the table.")] = False,
    any_code: Annotated[
        bool, typer.Option("--any-code", help="Cells that an older state of the code has finished are finished.")
    ] = False,
) -> None:
    """Train and measure every cell of the IMDB table that is not finished, and write the table."""
    student_name, teacher_name, common, of_student = SIZES[size.value]
    changes = [*common, *(overrides or [])]
    student = run_config(student_name, [*changes, *of_student, *(student_overrides or [])])
    teacher = run_config(teacher_name, [*changes, *(teacher_overrides or [])])
    numbers = seeds_of(seeds)
    if teacher_seed not in (None, *numbers):
        raise typer.BadParameter(f"{teacher_seed} is none of --seeds {seeds}", param_hint="--teacher-seed")
    ordered = sorted(numbers, key=lambda seed: seed != teacher_seed)  # what is needed comes first
    cells = [
        cell for seed in ordered for cell in distillation_cells(student, teacher, seed, teacher_seed=teacher_seed)
    ]
    rows = distillation_rows(student, teacher, "words")
    options = [f"--size {size.value}", f"--seeds {seeds}", f"--draws {draws}"]
    options += [f"--teacher-seed {teacher_seed}"] if teacher_seed is not None else []
    given = (("--set", overrides), ("--set-student", student_overrides), ("--set-teacher", teacher_overrides))
    options += [f"{flag} {value}" for flag, values in given for value in values or []]
    command = f"python benchmarks/imdb_table.py {' '.join(options)}"

    def render(found) -> list[str]:
        return [
            f"# {TITLES[size.value]}",
            "",
            "Test reviews, noise-free by the stored rule, bias fitted on dev; mean ± standard deviation over seeds.",
            "",
            *accuracy_table(found, rows),
            "",
            "## Differences",
            "",
            *comparison_table(found, COMPARISONS),
            "",
            "## Other ways to decide, and the teacher",
            "",
            *modes_table(found, rows),
            "",
            "## How it was made",
            "",
            *provenance(found, command),
        ]

    run_table(
        cells, render, results=results / size.value, work=work / size.value, jobs=jobs, device=device, draws=draws,
        only=only, table_only=table_only, any_code=any_code,
    )  # fmt: skip


if __name__ == "__main__":
    run(app)
