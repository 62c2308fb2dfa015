"""Train the teacher of the preset imdb_student, a MiniLM-L6 pair, and record what it says about every training review.

    python benchmarks/teachers.py                                  # an hour or two on two cores with bf16; resumes
    torchrun --nproc_per_node 2 benchmarks/teachers.py             # two processes share the training
    python benchmarks/teachers.py --set stages.classifier_epochs=2 # more, where there is a GPU

Labels of dev and test reviews are read to measure, never to train: no stage evaluates, the rule is top-k, and one
temperature is fitted on dev. The record holds ids, scores in a byte each and class probabilities, no texts.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from _models import environment

from rekd_train.checkpoints.checkpoint import read_metrics
from rekd_train.cli.command import application, examples, progress_bars, run
from rekd_train.config.run import run_config
from rekd_train.files import sha256, write_json
from rekd_train.runs import record_run, train_run
from rekd_train.training.state import FILE, training_directory

RECORD = Path(__file__).parent / "teachers" / "imdb.parquet"
FIGURES = ("examples", "accuracy", "rate", "rate_max", "count_mean", "nll", "ece")

app = application(help="Train a teacher of IMDB reviews and record what it says.", epilog=examples("teachers.py"))


def has_bf16() -> bool:
    """Whether this processor multiplies matrices in bf16 (AMX, or AVX-512's)."""
    with open("/proc/cpuinfo", encoding="utf-8") as facts:
        return bool({"amx_bf16", "avx512_bf16"} & set(facts.read().split()))


@app.command()
def teachers(
    preset: Annotated[str, typer.Argument(help="Its configuration.")] = "imdb_teacher",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    work: Annotated[Path, typer.Option(help="A folder for the checkpoint.")] = Path("runs/teachers"),
    record: Annotated[Path, typer.Option(help="Where the knowledge goes, its figures beside it.")] = RECORD,
) -> None:
    """Train, or go on where it was cut off; measure; record."""
    changes = [*(["acceleration.precision=bf16"] if has_bf16() else []), *(overrides or [])]
    config, checkpoint = run_config(preset, changes), work / preset
    if not checkpoint.exists():
        resume = (training_directory(checkpoint) / FILE).exists()
        with progress_bars() as observer:
            # before its first save a run leaves a log alone, to be replaced
            train_run(config, checkpoint, observer=observer, resume=resume, overwrite=not resume, device=device)
    if os.environ.get("RANK", "0") != "0":
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # the other processes have ended: none is to be waited for
        os.environ.pop(name, None)
    start = time.perf_counter()
    count = record_run(checkpoint, record, device=device, overwrite=True)
    metrics = read_metrics(checkpoint)
    write_json(record.with_suffix(".json"), {
        "command": shlex.join(["python", "benchmarks/teachers.py", *sys.argv[1:]]), "hardware": environment(device),
        "changes": changes, **{split: {name: metrics[split][name] for name in FIGURES} for split in ("dev", "test")},
        "record": {"texts": count, "bytes": record.stat().st_size, "sha256": sha256(record),
                   "seconds": round(time.perf_counter() - start)},
    })  # fmt: skip
    typer.echo(f"{checkpoint}: {metrics['test']['accuracy']:.4f} of the test reviews; {record}: {count} reviews")


if __name__ == "__main__":
    run(app)
