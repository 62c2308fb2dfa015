"""What a prediction costs: every variant of a model over a grid of batch, length and K, timed in rounds.

    figures.cells[]     batch, length, rounds
        around          of a batch beside the graphs: ``preprocess`` and ``decode``, percentiles in milliseconds
        ways[]          a variant; ``milliseconds`` (p50 with low and high, the 95 % interval of the median; p90, p95,
                        p99), ``items_per_second``, ``steps`` (wall clock by step), ``device_steps`` (events on the GPU)
        ratios[]        ``way``, ``baseline``, ``ratio``, ``low``, ``high``: the median of the rounds' own ratios
    figures.not_run[]   name, reason
    figures.machine     ``before`` and ``after``: see ``machine_state``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench.results import Check, Progress, machine_state, silent
from rekd_deploy.bench.variants import (
    ONNX_CPU,
    NotRun,
    Runnable,
    Timings,
    Variant,
    alike_check,
    classes_alike,
    comparisons,
    in_rounds,
    percentiles,
    with_interval,
)
from rekd_deploy.bench.variants_graphs import Loaded, traced
from rekd_deploy.bench.variants_torch import Networks, networks_of, pytorch_runnables, runtimes_of
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.parity.examples import generated_images, texts_from_vocabulary
from rekd_deploy.repository.reader import read_description
from rekd_deploy.runtimes.base import parse_device
from rekd_train.inputs.preprocessors import Encoded, Preprocessor
from rekd_train.inputs.text import TextPreprocessor

AT_HAND = 4
"""Batches that are taken one after another, so that no cache answers for the model."""
PREPROCESS, DECODE = "preprocess", "decode"
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
    """Of each variant in each cell."""
    device: str = "cpu"
    threads: int | None = None
    without: Sequence[str] = ()
    """Variants whose name contains one of these are left out."""

    def has(self, variant: Variant) -> bool:
        """Whether a variant is wanted."""
        return not any(part in variant.name for part in self.without)


@dataclass(frozen=True)
class Batches:
    """What is run in one cell of the grid."""

    items: list[list[Any]]
    """Texts or images, (at hand) lists of B."""
    encoded: list[Encoded]
    """The same as tensors, all of one shape."""


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
        precisions = sorted({"fp32", *(loaded.add_repository(Path(root)) for root in subjects.repositories)})
        networks, preprocessor, labels = _networks(subjects, grid)
        lengths, not_run = check_lengths(preprocessor, grid.lengths), loaded.not_run
        known = {replace(variant, runtime=ONNX_CPU) for variant in loaded.variants}
        needed = [each for each in networks if any(
            grid.has(variant) and variant not in known
            for variant in (each.variant(ONNX_CPU, precision) for precision in precisions)
        )]  # fmt: skip
        for each, models, precision in traced(
            needed, precisions, calibration_items(preprocessor), gpu=grid.device != "cpu", not_run=not_run,
            report=lambda done, total: progress("graphs", done, total),
        ):  # fmt: skip
            loaded.add_traced(each, models, precision)
        cells, alike = [], []
        for batch, length in ((batch, length) for length in lengths for batch in grid.batches):
            batches = full_batches(preprocessor, batch, length)
            runnables = _runnables(loaded, networks, batches, grid, not_run)
            alike.append(classes_alike(runnables, len(batches.items)))
            rounds = grid.rounds * (_SINGLE_ROUNDS if batch == 1 else 1)

            def report(done: int, step: str = f"batch {batch}, length {length}", rounds: int = rounds) -> None:
                progress(step, done, rounds)

            timings = in_rounds(
                {each.variant.name: each for each in runnables} | _around(preprocessor, labels, batches),
                rounds=rounds, warmup_seconds=grid.warmup_seconds, report=report,
            )  # fmt: skip
            cells.append({"batch": batch, "length": length, **_cell(timings, runnables, batch, rounds)})
    not_run = [each._asdict() for each in dict.fromkeys(not_run)]
    figures = {"cells": cells, "not_run": not_run, "machine": {"before": before, "after": machine_state()}}
    return figures, [alike_check(alike)]


def _networks(subjects: Subjects, grid: Grid) -> tuple[list[Networks], Preprocessor, Sequence[str]]:
    """The checkpoint's networks, how items become tensors, and the labels."""
    described = [read_description(Path(root)) for root in subjects.repositories]
    kinds = {(each.settings.kind, each.preprocessor().positions, each.labels) for each in described}
    if subjects.checkpoint is None:
        if grid.budgets or subjects.teacher:
            raise BenchmarkError("other K and the teacher's size are made from networks; fix: add --checkpoint")
        networks, preprocessor, labels = [], described[0].preprocessor(), described[0].labels
    else:
        from rekd_train.checkpoints.checkpoint import load

        pair = load(subjects.checkpoint)
        networks = networks_of(pair, None if subjects.teacher is None else load(subjects.teacher), grid.budgets)
        labels = tuple(pair.labels)
        preprocessor = described[0].preprocessor() if described else pair.preprocessor
        kinds.add((pair.preprocessor.settings.kind, pair.preprocessor.positions, labels))
    if len(kinds) > 1:
        raise BenchmarkError(
            "what is to be compared reads other tensors or has other labels; fix: exports of one checkpoint, and that"
        )
    return networks, preprocessor, labels


def _runnables(
    loaded: Loaded, networks: Sequence[Networks], batches: Batches, grid: Grid, not_run: list[NotRun]
) -> list[Runnable]:
    """Every wanted variant on one cell's batches."""
    arrays = [dict(encoded.inputs) for encoded in batches.encoded]
    found = [each for each in loaded.runnables(arrays) if grid.has(each.variant)]
    for each in networks:
        wanted = [runtime for runtime in runtimes_of(grid.device) if grid.has(each.variant(runtime))]
        more, missing = pytorch_runnables(each, arrays, grid.device, wanted)
        found, not_run[:] = found + more, not_run + missing
    if not found:
        raise BenchmarkError(f"nothing is left to time without {', '.join(grid.without) or 'what could not be loaded'}")
    return found


def _around(preprocessor: Preprocessor, labels: Sequence[str], batches: Batches) -> dict[str, Callable[[int], Any]]:
    """What a prediction needs beside the graphs; decoding is timed on a rationale of an eighth of the features."""
    count, rows = len(batches.items), len(batches.items[0])
    first = batches.encoded[0].inputs
    width = first["input_ids"].shape[1] if "input_ids" in first else preprocessor.positions
    probabilities = np.full((rows, len(labels)), 1 / len(labels), np.float32)
    mask = np.tile(np.arange(width) % 8 == 1, (rows, 1))
    scores = mask.astype(np.float32)
    return {
        PREPROCESS: lambda number: preprocessor(batches.items[number % count]),
        DECODE: lambda number: batches.encoded[number % count].predictions(labels, probabilities, mask, scores),
    }


def _cell(timings: Timings, runnables: Sequence[Runnable], batch: int, rounds: int) -> dict[str, Any]:
    def by_step(steps: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        return {step: percentiles(milliseconds) for step, milliseconds in steps.items()}

    ways = []
    for each in runnables:
        times = timings.milliseconds[each.variant.name]
        ways.append({
            **each.variant.to_dict(), "milliseconds": with_interval(times),
            "items_per_second": 1000 * batch / float(times.mean()), "steps": by_step(each.last(rounds)),
            "device_steps": by_step(each.last(rounds, "device")),
        })  # fmt: skip
    ratios = [
        {"way": variant.name, "baseline": other.name, **timings.ratio(variant.name, other.name)}
        for variant, other in comparisons([each.variant for each in runnables])
    ]
    around = by_step({name: timings.milliseconds[name] for name in (PREPROCESS, DECODE)})
    return {"rounds": rounds, "around": around, "ways": ways, "ratios": ratios}


# inputs


def check_lengths(preprocessor: Preprocessor, lengths: Sequence[int]) -> list[int]:
    """The lengths to time; for images their number of patches, alone.

    Raises:
        BenchmarkError: a length is not served, or lengths were given for images.
    """
    if not isinstance(preprocessor, TextPreprocessor):
        if lengths:
            raise BenchmarkError("the model reads images, which have one length; fix: leave out --lengths")
        return [preprocessor.positions]
    served = preprocessor.settings.buckets
    if unknown := [length for length in lengths if length not in served]:
        raise BenchmarkError(
            f"the length {unknown[0]} is not served; lengths: {', '.join(map(str, served))} (others would be padded to "
            "the next)"
        )
    return sorted({*lengths} or {served[len(served) // 4], served[len(served) // 2], served[-1]})


def calibration_items(preprocessor: Preprocessor) -> list[Any]:
    """What int8 graphs that are only timed are calibrated on; their times do not depend on it."""
    if isinstance(preprocessor, TextPreprocessor):
        return texts_from_vocabulary(preprocessor)
    return list(generated_images(preprocessor.settings))


def full_batches(preprocessor: Preprocessor, batch: int, length: int, seed: int = 0) -> Batches:
    """Random words, or images with slopes and noise; texts fill ``length`` tokens, the worst case."""
    generator = np.random.default_rng(seed)
    if not isinstance(preprocessor, TextPreprocessor):
        images = generated_images(preprocessor.settings, count=batch * AT_HAND, seed=seed)
        items = [list(images[start : start + batch]) for start in range(0, len(images), batch)]
    else:
        words = preprocessor.words() or ["a"]
        items = [[_text(preprocessor, words, length, generator) for _ in range(batch)] for _ in range(AT_HAND)]
    return Batches(items, [preprocessor(each) for each in items])


def _text(preprocessor: TextPreprocessor, words: Sequence[str], length: int, generator: np.random.Generator) -> str:
    """Words until the tokens are ``length``; a tokenizer may cut a word into several, so the end is cut off."""
    text = " ".join(generator.choice(words, size=length))
    offsets = preprocessor.encode([text])[0].offsets
    if len(offsets) <= length:
        return text
    specials = len(preprocessor.special_ids) - 1  # [PAD] is in no text
    return text[: offsets[length - specials][1]]
