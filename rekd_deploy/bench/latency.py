"""What an answer costs: every form of a model over a grid of batch, length and K, timed in turns.

    figures.cells[]     batch, length, rounds, and what ``latency_figures`` makes of the times
    figures.not_run[]   name, reason
    figures.machine     ``before`` and ``after``: see machine_state
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench.forms import ONNX_CPU, Form, NotRun, Way
from rekd_deploy.bench.interleaved import interleaved
from rekd_deploy.bench.latency_figures import DECODE, PREPROCESS, alike_check, cell_figures, classes_alike
from rekd_deploy.bench.latency_inputs import Batches, calibration_items, check_lengths, full_batches
from rekd_deploy.bench.lines import Line, lines_of
from rekd_deploy.bench.machine_state import machine_state
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.results import Check
from rekd_deploy.bench.traced import Traced, traced_lines
from rekd_deploy.bench.ways_graphs import Loaded
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.repository.reader import read_description
from rekd_deploy.runtimes.base import Arrays, parse_device
from rekd_train.inputs.preprocessors import Preprocessor

_SINGLE_ROUNDS = 5
"""At batch 1 so many times the rounds: they are short, and it is there that people look."""


@dataclass(frozen=True)
class Subjects:
    """What is timed; a repository or a checkpoint at least."""

    repositories: Sequence[Path] = ()
    checkpoint: Path | None = None
    teacher: Path | None = None
    """A checkpoint; its size is that of the larger classifier."""


@dataclass(frozen=True)
class Grid:
    """Where it is timed."""

    batches: Sequence[int] = (1, 8, 32)
    lengths: Sequence[int] = ()
    """Tokens; empty: a short, a middle and the greatest that is served."""
    budgets: Sequence[float] = ()
    """Further shares of the features that a compacted pair may keep."""
    rounds: int = 15
    warmup_seconds: float = 0.5
    """Of each way in each cell."""
    device: str = "cpu"
    threads: int | None = None
    without: Sequence[str] = ()
    """Forms whose name contains one of these are left out."""

    def has(self, form: Form) -> bool:
        """Whether a form is wanted."""
        return not any(part in form.name for part in self.without)


def measure_latency(subjects: Subjects, grid: Grid, progress: Progress = silent) -> tuple[dict[str, Any], list[Check]]:
    """Figures and checks, as described above.

    Raises:
        BenchmarkError: nothing to time, or a batch, length or budget that cannot be.
        EngineError: there is no such device.
        RepositoryError, CheckpointError: what is timed is missing or damaged.
    """
    if not subjects.repositories and subjects.checkpoint is None:
        raise BenchmarkError("there is nothing to time; give a repository, a --checkpoint, or both")
    if min(grid.batches, default=0) < 1:
        raise BenchmarkError(f"the batches are {list(grid.batches)}; give numbers from 1 up")
    parse_device(grid.device)
    before = machine_state()
    with ExitStack() as stack:
        loaded = Loaded(stack, grid.device, grid.threads)
        precisions = [loaded.add_repository(Path(root)) for root in subjects.repositories]
        lines, preprocessor, labels = _lines(subjects, grid)
        lengths = check_lengths(preprocessor, grid.lengths)
        not_run = loaded.not_run
        for line, models, precision in _traced(loaded, lines, precisions, preprocessor, grid, progress):
            loaded.add_traced(line, models, precision)
        cells, alike = [], []
        for batch, length in ((batch, length) for length in lengths for batch in grid.batches):
            batches = full_batches(preprocessor, batch, length)
            ways = _ways(loaded, lines, batches, grid, not_run)
            alike.append(classes_alike(ways, len(batches.items)))
            rounds = grid.rounds * (_SINGLE_ROUNDS if batch == 1 else 1)

            def report(done: int, step: str = f"batch {batch}, length {length}", rounds: int = rounds) -> None:
                progress(step, done, rounds)

            timings = interleaved(
                {way.form.name: way for way in ways} | _around(preprocessor, labels, batches),
                rounds=rounds, warmup_seconds=grid.warmup_seconds, report=report,
            )  # fmt: skip
            cells.append({"batch": batch, "length": length, **cell_figures(timings, ways, batch, rounds)})
    figures = {
        "cells": cells,
        "not_run": [each._asdict() for each in dict.fromkeys(not_run)],
        "machine": {"before": before, "after": machine_state()},
    }
    return figures, [alike_check(alike)]


def _lines(subjects: Subjects, grid: Grid) -> tuple[list[Line], Preprocessor, Sequence[str]]:
    """The checkpoint's arrangements, how items become tensors, and the labels."""
    described = [read_description(Path(root)) for root in subjects.repositories]
    kinds = {(each.settings.kind, each.preprocessor().positions, each.labels) for each in described}
    if subjects.checkpoint is None:
        if grid.budgets or subjects.teacher:
            raise BenchmarkError("other K and the teacher's size are made from networks; fix: add --checkpoint")
        lines, preprocessor, labels = [], described[0].preprocessor(), described[0].labels
    else:
        from rekd_train.checkpoints.checkpoint import load

        pair = load(subjects.checkpoint)
        lines = lines_of(pair, None if subjects.teacher is None else load(subjects.teacher), grid.budgets)
        labels = tuple(pair.labels)
        preprocessor = described[0].preprocessor() if described else pair.preprocessor
        kinds.add((pair.preprocessor.settings.kind, pair.preprocessor.positions, labels))
    if len(kinds) > 1:
        raise BenchmarkError(
            "what is to be compared reads other tensors or has other labels; fix: exports of one checkpoint, and that"
        )
    return lines, preprocessor, labels


def _traced(
    loaded: Loaded, lines: Sequence[Line], precisions: Sequence[str], preprocessor: Preprocessor, grid: Grid,
    progress: Progress,
) -> Iterator[Traced]:  # fmt: skip
    """The wanted lines that no repository has given, in float32 and in the repositories' precisions."""
    precisions = sorted({"fp32", *precisions})
    known = {replace(form, runtime=ONNX_CPU) for form in loaded.forms}

    def needed(line: Line) -> bool:
        forms = [Form(ONNX_CPU, line.model, each, line.graphs, line.kept) for each in precisions]
        return any(grid.has(form) and form not in known for form in forms)

    return traced_lines(
        list(filter(needed, lines)), precisions, calibration_items(preprocessor), gpu=grid.device != "cpu",
        not_run=loaded.not_run, report=lambda done, total: progress("graphs", done, total),
    )  # fmt: skip


def _ways(
    loaded: Loaded, lines: Sequence[Line], batches: Batches, grid: Grid, not_run: list[NotRun]
) -> list[Way]:
    """Every wanted form on one cell's batches."""
    arrays: list[Arrays] = [dict(encoded.inputs) for encoded in batches.encoded]
    ways = [way for way in loaded.ways(arrays) if grid.has(way.form)]
    if lines:
        from rekd_deploy.bench.ways_pytorch import pytorch_ways, runtimes_of

        for line in lines:
            forms = {each: Form(each, line.model, graphs=line.graphs, kept=line.kept)
                     for each in runtimes_of(grid.device)}  # fmt: skip
            runtimes = [runtime for runtime, form in forms.items() if grid.has(form)]
            found, missing = pytorch_ways(line, arrays, grid.device, runtimes)
            ways += found
            not_run += missing
    if not ways:
        raise BenchmarkError(f"nothing is left to time without {', '.join(grid.without) or 'what could not be loaded'}")
    return ways


def _around(preprocessor: Preprocessor, labels: Sequence[str], batches: Batches) -> dict[str, Callable[[int], Any]]:
    """What an answer needs beside the graphs; decoding is timed on a rationale of an eighth of the features."""
    count, rows = len(batches.items), len(batches.items[0])
    first = batches.encoded[0].inputs
    width = first["input_ids"].shape[1] if "input_ids" in first else preprocessor.positions
    probabilities = np.full((rows, len(labels)), 1 / len(labels), np.float32)
    mask = np.tile(np.arange(width) % 8 == 1, (rows, 1))
    scores = mask.astype(np.float32)
    return {
        PREPROCESS: lambda turn: preprocessor(batches.items[turn % count]),
        DECODE: lambda turn: batches.encoded[turn % count].predictions(labels, probabilities, mask, scores),
    }
