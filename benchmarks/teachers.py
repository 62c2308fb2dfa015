"""Train the teachers of the demos, and record what they say about the training reviews and images.

    python benchmarks/teachers.py                             # two hours on two cores, less with AMX; resumes
    torchrun --nproc_per_node 2 benchmarks/teachers.py        # two processes share it; again for the pair
    python benchmarks/teachers.py fashion_student             # twenty minutes on a core
    python benchmarks/teachers.py --sentences                 # the short sentences anew, the rest as it was recorded

The record of reviews has three parts: what a MiniLM-L6 pair says about each review; what a plain classifier says about
a sentence of each, and about what follows the first 180 words of the long ones; and short sentences with a negation or
a contrast (``_short_sentences.py``). It holds ids, scores in a byte each and class probabilities, and no texts but the
last. That of images has what a pair says about the ones that the demo reads.

Labels of dev and test reviews are read to measure, never to train: no stage evaluates, the rule is top-k, and one
temperature is fitted on dev.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from _models import environment
from _short_sentences import short_sentences

from rekd_train.checkpoints.checkpoint import load, read_metrics
from rekd_train.cli.command import application, examples, progress_bars, run
from rekd_train.config.run import RunConfig, run_config
from rekd_train.data import load_data
from rekd_train.data.examples import later_passages, some_sentences, text_id
from rekd_train.errors import DataError
from rekd_train.files import sha256, write_json
from rekd_train.runs import statements_in_order, train_run
from rekd_train.training.runtime import Runtime
from rekd_train.training.state import FILE, training_directory
from rekd_train.training.teacher import write_knowledge, write_parquet

RECORDS = Path(__file__).parent / "teachers"
SHORT = 12_000  # short sentences
LABELS = ("negative", "positive")  # of the reviews
FIGURES = ("examples", "accuracy", "rate", "rate_max", "count_mean", "nll", "ece")

app = application(help="Train a teacher of IMDB reviews and record what it says.", epilog=examples("teachers.py"))


def has_bf16() -> bool:
    """Whether bf16 pays on this processor: AMX multiplies it. AVX-512's instructions took twice the time of fp32."""
    with open("/proc/cpuinfo", encoding="utf-8") as facts:
        return "amx_bf16" in facts.read().split()


@app.command()
def teachers(
    preset: Annotated[str, typer.Argument(help="Its configuration.")] = "imdb_teacher",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    work: Annotated[Path, typer.Option(help="A folder for the checkpoints.")] = Path("runs/teachers"),
    record: Annotated[
        Path | None, typer.Option(help="Where the record goes, its figures beside it.", show_default="teachers/DATA")
    ] = None,
    sentences: Annotated[
        bool, typer.Option("--sentences", help="Train nothing; exchange the record's short sentences.")
    ] = False,
) -> None:
    """Train, or go on where it was cut off; measure; record."""
    changes = [*(["acceleration.precision=bf16"] if has_bf16() and device != "cuda" else []), *(overrides or [])]
    config, classifier = run_config(preset, changes), None
    record = record or RECORDS / f"{config.data.name}.parquet"
    if sentences:
        exchange_sentences(record)
        return
    if config.stages.selector_start == "evidence":
        classifier, alone = work / f"{preset}_classifier", {"masked_share": 0.0, "rationale_epochs": 0.0}
        new = not classifier.exists()
        trained(config.model_copy(update={"stages": config.stages.model_copy(update=alone)}), classifier, device)
        if new and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a group of processes ends with its training
            if os.environ["RANK"] == "0":
                typer.echo(f"{classifier}: trained; the same command again trains the pair")
            return
    checkpoint = trained(config, work / preset, device, warm_start=classifier)
    if os.environ.get("RANK", "0") != "0":
        return
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # the other processes have ended: none is to be waited for
        os.environ.pop(variable, None)
    start = time.perf_counter()
    rows = recorded(config, checkpoint, classifier, device)
    write_knowledge(record, rows, overwrite=True)
    metrics = read_metrics(checkpoint)
    facts = {**facts_of(record, len(rows)), "seconds": round(time.perf_counter() - start)}
    write_json(record.with_suffix(".json"), {
        "command": shlex.join(["python", "benchmarks/teachers.py", *sys.argv[1:]]), "hardware": environment(device),
        "changes": changes, **{split: {name: metrics[split][name] for name in FIGURES} for split in ("dev", "test")},
        "record": facts,
    })  # fmt: skip
    typer.echo(f"{checkpoint}: {metrics['test']['accuracy']:.4f} on test; {record}: {len(rows)} rows")


def trained(config: RunConfig, checkpoint: Path, device: str, warm_start: Path | None = None) -> Path:
    """The checkpoint, made unless it is there."""
    if not checkpoint.exists():
        resume = (training_directory(checkpoint) / FILE).exists()
        with progress_bars() as observer:
            # before its first save a run leaves a log alone, to be replaced
            train_run(config, checkpoint, warm_start=warm_start, observer=observer, resume=resume,
                      overwrite=not resume, device=device)  # fmt: skip
    return checkpoint


def recorded(config: RunConfig, checkpoint: Path, classifier: Path | None, device: str) -> list[dict[str, Any]]:
    """The rows: about each training example; of reviews also about parts of them, and short sentences."""
    pair, runtime, precision = load(checkpoint), Runtime(device), config.acceleration.precision
    items = load_data(config.data).splits["train"].items
    if classifier is None:
        read = run_config("demo_images_student").data.train_examples  # its teacher has seen more
        return statements_in_order(pair, items[:read], runtime, precision)
    rows = statements_in_order(pair, items, runtime, precision)
    known = {row["id"] for row in rows}  # a review may be one sentence
    later = (part for text in items for part in later_passages(text))
    parts = [part for part in dict.fromkeys([*later, *some_sentences(items, 1)]) if text_id(part) not in known]
    rows += statements_in_order(load(classifier), parts, runtime, precision)
    known = {row["id"] for row in rows}  # people write such sentences, too
    return rows + [row for row in short_sentences(SHORT, pair.labels) if text_id(row["text"]) not in known]


def exchange_sentences(record: Path) -> None:
    """Write the short sentences of a record anew; what a teacher said, and its figures, stay."""
    from pyarrow import Table, parquet

    table = parquet.read_table(record)
    if "text" not in table.schema.names:
        raise DataError(f"{record} holds no sentences; fix: the record of reviews, which imdb_teacher makes")
    said = [row for row in table.to_pylist() if row["text"] is None]
    known = {row["id"] for row in said}
    made = [row for row in short_sentences(SHORT, LABELS) if text_id(row["text"]) not in known]
    rows = [{name: row.get(name) for name in table.schema.names} for row in said + made]
    write_parquet(record, Table.from_pylist(rows, table.schema))
    figures = record.with_suffix(".json")
    document = json.loads(figures.read_text(encoding="utf-8"))
    document["record"] |= facts_of(record, len(rows))
    write_json(figures, document)
    typer.echo(f"{record}: {len(made)} short sentences, {len(said)} other rows as they were")


def facts_of(record: Path, rows: int) -> dict[str, Any]:
    """What is told of the file itself."""
    return {"rows": rows, "bytes": record.stat().st_size, "sha256": sha256(record)}


if __name__ == "__main__":
    run(app)
