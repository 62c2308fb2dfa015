"""What a prediction costs: every variant of a model over a grid of batch and length, timed in rounds.

    figures.cells[]     batch, length, rounds
        ways[]          a variant; ``milliseconds`` (p50 with low and high, the 95 % interval of the median; p90, p95,
                        p99), ``items_per_second``
        ratios[]        ``way``, ``baseline``, ``ratio``, ``low``, ``high``: the median of the rounds' own ratios
    figures.not_run[]   name, reason
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench import variants
from rekd_deploy.bench.results import Check, Progress, not_applicable, silent, verdict
from rekd_deploy.bench.timing import in_rounds, with_interval
from rekd_deploy.bench.variants_graphs import Loaded, traced
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.parity.examples import generated_images, texts_from_vocabulary
from rekd_deploy.repository.reader import read_description
from rekd_deploy.runtimes.base import Arrays, parse_device
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor

AT_HAND = 4
"""Batches that are taken one after another, so that no cache answers for the model."""
_SINGLE_ROUNDS = 5
"""At batch 1 so many times the rounds: they are short, and it is there that people look."""
_CLASSES_ALIKE = 0.98
"""Share of rows on which float32 variants of one model must agree about the class."""


@dataclass(frozen=True)
class Grid:
    """What is timed, and where; a repository or a checkpoint at least."""

    repositories: Sequence[Path] = ()
    checkpoint: Path | None = None
    teacher: Path | None = None
    """A checkpoint; its size is that of the larger classifier."""
    batches: Sequence[int] = (1, 8, 32)
    lengths: Sequence[int] = ()
    """Tokens; empty: a short, a middle and the greatest that is served."""
    rounds: int = 15
    warmup_seconds: float = 0.5
    """Of each variant in each cell."""
    device: str = "cpu"
    threads: int | None = None
    without: Sequence[str] = ()
    """Variants whose name contains one of these are left out."""

    def has(self, variant: variants.Variant) -> bool:
        """Whether a variant is wanted."""
        return not any(part in variant.name for part in self.without)


def measure_latency(grid: Grid, progress: Progress = silent) -> tuple[dict[str, Any], list[Check]]:
    """Figures and checks, as described above.

    Raises:
        BenchmarkError: nothing to time, or a batch, length or budget that cannot be.
        EngineError: there is no such device.
        RepositoryError, CheckpointError: what is timed is missing or damaged.
    """
    if not grid.repositories and grid.checkpoint is None:
        raise BenchmarkError("there is nothing to time; give a repository, a --checkpoint, or both")
    if min(grid.batches, default=0) < 1:
        raise BenchmarkError(f"the batches are {list(grid.batches)}; give numbers from 1 up")
    parse_device(grid.device)
    with ExitStack() as stack:
        loaded = Loaded(stack, grid.device, grid.threads)
        precisions = sorted({"fp32", *(loaded.add_repository(Path(root)) for root in grid.repositories)})
        networks, preprocessor = _networks(grid)
        lengths, not_run = check_lengths(preprocessor, grid.lengths), loaded.not_run
        known = {replace(variant, runtime=variants.ONNX_CPU) for variant in loaded.variants}
        needed = [each for each in networks if any(
            grid.has(variant) and variant not in known
            for variant in (each.variant(variants.ONNX_CPU, precision) for precision in precisions)
        )]  # fmt: skip
        for variant, graphs in traced(
            needed, precisions, calibration_items(preprocessor), gpu=grid.device != "cpu", not_run=not_run,
            report=lambda done, total: progress("graphs", done, total),
        ):  # fmt: skip
            loaded.add_graphs(variant, graphs)
        cells, alike = [], []
        for batch, length in ((batch, length) for length in lengths for batch in grid.batches):
            batches = [dict(preprocessor(items).inputs) for items in full_batches(preprocessor, batch, length)]
            runnables = _runnables(loaded, networks, batches, grid)
            alike.append(classes_alike(runnables, len(batches)))
            rounds = grid.rounds * (_SINGLE_ROUNDS if batch == 1 else 1)
            cells.append({
                "batch": batch, "length": length, "rounds": rounds,
                **_cell(runnables, batch, rounds, grid, progress, f"batch {batch}, length {length}"),
            })  # fmt: skip
    not_run = [each._asdict() for each in dict.fromkeys(not_run)]
    return {"cells": cells, "not_run": not_run}, [alike_check(alike)]


def _networks(grid: Grid) -> tuple[list[variants.Networks], Preprocessor]:
    """The checkpoint's networks, and how items become tensors."""
    described = [read_description(Path(root)) for root in grid.repositories]
    kinds = {(each.settings.kind, each.preprocessor().positions, each.labels) for each in described}
    networks: list[variants.Networks] = []
    if grid.checkpoint is not None:
        from rekd_train.checkpoints.checkpoint import load

        pair = load(grid.checkpoint)
        networks = variants.networks_of(pair, None if grid.teacher is None else load(grid.teacher))
        kinds.add((pair.preprocessor.settings.kind, pair.preprocessor.positions, tuple(pair.labels)))
    elif grid.teacher:
        raise BenchmarkError("the teacher's size is made from networks; fix: add --checkpoint")
    if len(kinds) > 1:
        raise BenchmarkError(
            "what is to be compared reads other tensors or has other labels; fix: exports of one checkpoint, and that"
        )
    return networks, described[0].preprocessor() if described else pair.preprocessor


def _runnables(
    loaded: Loaded, networks: Sequence[variants.Networks], batches: Sequence[Arrays], grid: Grid
) -> list[variants.Runnable]:
    """Every wanted variant on one cell's batches."""
    found = [each for each in loaded.runnables(batches) if grid.has(each.variant)]
    for each in networks:
        wanted = [runtime for runtime in variants.runtimes_of(grid.device) if grid.has(each.variant(runtime))]
        more, missing = variants.pytorch_runnables(each, batches, grid.device, wanted)
        found += more
        loaded.not_run += missing
    if not found:
        raise BenchmarkError(f"nothing is left to time without {', '.join(grid.without) or 'what could not be loaded'}")
    return found


def _cell(
    runnables: Sequence[variants.Runnable], batch: int, rounds: int, grid: Grid, progress: Progress, step: str
) -> dict[str, Any]:
    timings = in_rounds(
        {each.variant.name: each.run for each in runnables}, rounds=rounds, warmup_seconds=grid.warmup_seconds,
        report=lambda done: progress(step, done, rounds),
    )  # fmt: skip
    ways = []
    for each in runnables:
        times = timings.milliseconds[each.variant.name]
        speed = 1000 * batch / float(times.mean())
        ways.append({**each.variant.to_dict(), "milliseconds": with_interval(times), "items_per_second": speed})
    ratios = [
        {"way": variant.name, "baseline": other.name, **timings.ratio(variant.name, other.name)}
        for variant, other in variants.comparisons([each.variant for each in runnables])
    ]
    return {"ways": ways, "ratios": ratios}


def classes_alike(runnables: Sequence[variants.Runnable], count: int) -> tuple[int, int]:
    """Rows on which float32 variants of a model predict as the first of them does, and all rows that were compared.

    Args:
        count: how many batches there are.
    """
    same = rows = 0
    first: dict[tuple[str, int | None], list[np.ndarray]] = {}
    for each in (each for each in runnables if each.variant.precision == "fp32"):
        classes = [np.asarray(each.run(number)).argmax(axis=1) for number in range(count)]
        model = each.variant.model, each.variant.kept
        if model in first:
            same += sum(int((ours == theirs).sum()) for ours, theirs in zip(classes, first[model], strict=True))
            rows += sum(map(len, classes))
        first.setdefault(model, classes)
    return same, rows


def alike_check(alike: Sequence[tuple[int, int]]) -> Check:
    """The check over all cells: what is fast must also be right."""
    (same, rows), name = (sum(counts) for counts in zip(*alike, strict=True)), "what is timed answers alike"
    if not rows:
        return not_applicable(name, "no model was timed in two float32 variants")
    words = f"{same:,} of {rows:,} predictions have the class of the first float32 variant of the same model"
    return verdict(name, same / rows >= _CLASSES_ALIKE, words, same / rows, _CLASSES_ALIKE)


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


def full_batches(preprocessor: Preprocessor, batch: int, length: int, seed: int = 0) -> list[list[Any]]:
    """``AT_HAND`` batches of random words, or images with slopes and noise; texts fill ``length`` tokens, the worst
    case."""
    generator = np.random.default_rng(seed)
    if not isinstance(preprocessor, TextPreprocessor):
        images = generated_images(preprocessor.settings, count=batch * AT_HAND, seed=seed)
        return [list(images[start : start + batch]) for start in range(0, len(images), batch)]
    words = preprocessor.words() or ["a"]
    return [[_text(preprocessor, words, length, generator) for _ in range(batch)] for _ in range(AT_HAND)]


def _text(preprocessor: TextPreprocessor, words: Sequence[str], length: int, generator: np.random.Generator) -> str:
    """Words until the tokens are ``length``; a tokenizer may cut a word into several, so the end is cut off."""
    text = " ".join(generator.choice(words, size=length))
    offsets = preprocessor.encode([text])[0].offsets
    if len(offsets) <= length:
        return text
    specials = len(preprocessor.special_ids) - 1  # [PAD] is in no text
    return text[: offsets[length - specials][1]]
