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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench import variants
from rekd_deploy.bench.results import Check, Progress, not_applicable, silent, verdict
from rekd_deploy.bench.timing import in_rounds, with_interval
from rekd_deploy.bench.variants_graphs import Loaded, traced
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.parity.examples import made_up
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


def measure_latency(
    repositories: Sequence[Path] = (), checkpoint: Path | None = None, teacher: Path | None = None, *,
    batches: Sequence[int] = (1, 8, 32), lengths: Sequence[int] = (), rounds: int = 15, warmup_seconds: float = 0.5,
    device: str = "cpu", threads: int | None = None, without: Sequence[str] = (), progress: Progress = silent,
) -> tuple[dict[str, Any], list[Check]]:  # fmt: skip
    """Figures and checks, as described above.

    Args:
        repositories: of one model; they or a checkpoint at least.
        teacher: a checkpoint; its size is that of the larger classifier.
        lengths: tokens; empty: a short, a middle and the greatest that is served.
        warmup_seconds: of each variant in each cell.
        without: variants whose name contains one of these are left out.

    Raises:
        BenchmarkError: nothing to time, or a batch or length that cannot be.
        EngineError: there is no such device.
        RepositoryError, CheckpointError: what is timed is missing or damaged.
    """
    if not repositories and checkpoint is None:
        raise BenchmarkError("there is nothing to time; give a repository, a --checkpoint, or both")
    if min(batches, default=0) < 1:
        raise BenchmarkError(f"the batches are {list(batches)}; give numbers from 1 up")

    def has(variant: variants.Variant) -> bool:
        return not any(part in variant.name for part in without)

    parse_device(device)
    with ExitStack() as stack:
        loaded = Loaded(stack, device, threads)
        precisions = sorted({"fp32", *(loaded.add_repository(Path(root)) for root in repositories)})
        networks, preprocessor = _networks(repositories, checkpoint, teacher)
        lengths = check_lengths(preprocessor, lengths)
        known = {replace(variant, runtime=variants.ONNX_CPU) for variant in loaded.variants}
        needed = [each for each in networks if any(
            has(variant) and variant not in known
            for variant in (each.variant(variants.ONNX_CPU, precision) for precision in precisions)
        )]  # fmt: skip
        for variant, graphs in traced(
            needed, precisions, made_up(preprocessor), gpu=device != "cpu", not_run=loaded.not_run,
            report=lambda done, total: progress("graphs", done, total),
        ):  # fmt: skip
            loaded.add_graphs(variant, graphs)
        cells, alike = [], []
        for batch, length in ((batch, length) for length in lengths for batch in batches):
            inputs = full_batches(preprocessor, batch, length)
            runnables = [each for each in loaded.runnables(inputs) if has(each.variant)]
            for each in networks:
                wanted = [runtime for runtime in variants.runtimes_of(device) if has(each.variant(runtime))]
                more, missing = variants.pytorch_runnables(each, inputs, device, wanted)
                runnables += more
                loaded.not_run += missing
            if not runnables:
                said = ", ".join(without) or "what could not be loaded"
                raise BenchmarkError(f"nothing is left to time without {said}")
            alike.append(classes_alike(runnables, len(inputs)))
            count, step = rounds * (_SINGLE_ROUNDS if batch == 1 else 1), f"batch {batch}, length {length}"
            timings = in_rounds(
                {each.variant.name: each.run for each in runnables}, rounds=count, warmup_seconds=warmup_seconds,
                report=lambda done, step=step, count=count: progress(step, done, count),
            )  # fmt: skip
            times = timings.milliseconds
            cells.append({
                "batch": batch, "length": length, "rounds": count,
                "ways": [
                    {**each.variant.to_dict(), "milliseconds": with_interval(times[each.variant.name]),
                     "items_per_second": 1000 * batch / float(times[each.variant.name].mean())}
                    for each in runnables
                ],
                "ratios": [
                    {"way": variant.name, "baseline": other.name, **timings.ratio(variant.name, other.name)}
                    for variant, other in variants.comparisons([each.variant for each in runnables])
                ],
            })  # fmt: skip
    not_run = [each._asdict() for each in dict.fromkeys(loaded.not_run)]
    return {"cells": cells, "not_run": not_run}, [alike_check(alike)]


def _networks(
    repositories: Sequence[Path], checkpoint: Path | None, teacher: Path | None
) -> tuple[list[variants.Networks], Preprocessor]:
    """The checkpoint's networks, and how items become tensors."""
    described = [read_description(Path(root)) for root in repositories]
    kinds = {(each.settings.kind, each.preprocessor().positions, each.labels) for each in described}
    networks: list[variants.Networks] = []
    if checkpoint is not None:
        from rekd_train.checkpoints.checkpoint import load

        pair = load(checkpoint)
        networks = variants.networks_of(pair, None if teacher is None else load(teacher))
        kinds.add((pair.preprocessor.settings.kind, pair.preprocessor.positions, tuple(pair.labels)))
    elif teacher:
        raise BenchmarkError("the teacher's size is made from networks; fix: add --checkpoint")
    if len(kinds) > 1:
        raise BenchmarkError("what is compared reads other tensors or has other labels; fix: exports of one checkpoint")
    return networks, described[0].preprocessor() if described else pair.preprocessor


def classes_alike(runnables: Sequence[variants.Runnable], count: int) -> tuple[int, int]:
    """Rows on which float32 variants of a model predict as the first of them does, and all; of ``count`` batches."""
    same = rows = 0
    first: dict[tuple[str, int | None], np.ndarray] = {}
    for each in (each for each in runnables if each.variant.precision == "fp32"):
        classes = np.concatenate([np.asarray(each.run(number)).argmax(axis=1) for number in range(count)])
        model = each.variant.model, each.variant.kept
        if model in first:
            same, rows = same + int((classes == first[model]).sum()), rows + len(classes)
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
        known = ", ".join(map(str, served))
        raise BenchmarkError(f"the length {unknown[0]} is not served; lengths: {known} (others would be padded)")
    return sorted({*lengths} or {served[len(served) // 4], served[len(served) // 2], served[-1]})


def full_batches(preprocessor: Preprocessor, batch: int, length: int, seed: int = 0) -> list[Arrays]:
    """``AT_HAND`` batches of tensors: random words that fill ``length`` tokens, the worst case, or random pixels."""
    generator, settings = np.random.default_rng(seed), preprocessor.settings
    if not isinstance(preprocessor, TextPreprocessor):
        shape = (AT_HAND, batch, settings.height, settings.width, settings.channels)
        return [{"pixels": each} for each in generator.integers(0, 256, shape, dtype=np.uint8)]
    start, *ends = preprocessor.around
    words = np.setdiff1d(np.arange(preprocessor.vocabulary_size), list(preprocessor.special_ids.values()))
    ids = generator.choice(words, (AT_HAND, batch, length))
    ids[..., 0], ids[..., length - len(ends) :] = start, ends
    return [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in ids]
