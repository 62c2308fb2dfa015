"""What ``gpu.py`` does on a GPU, a step a process. Each writes what it has found so far after each cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_graphs import Pair, network
from _gpu_machine import no_torch_cuda

from rekd_deploy.bench.timing import closed_loop, in_rounds, with_interval
from rekd_deploy.bench.variants import (
    BOTH,
    CLASSIFIER,
    COMPACTED,
    COMPILED,
    ONNX_GRAPHS,
    PREDICTOR,
    PYTORCH,
    PYTORCH_GRAPHS,
    SINGLE,
    Networks,
    Runnable,
    Variant,
    pytorch_runnables,
)
from rekd_deploy.bench.variants_graphs import Loaded
from rekd_deploy.contract.parity_report import limits_of, verification_limits
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.export.options import GPU_PRECISIONS
from rekd_deploy.parity.reference import Agreement, complaints
from rekd_deploy.runtimes.base import Arrays
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.cli.command import finite
from rekd_train.errors import RekdError
from rekd_train.files import write_json

AT_HAND = 4
"""Batches that are taken one after another."""


class Skipped(RekdError):
    """A step that this machine has not what it needs for."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    cells: Sequence[tuple[int, int]] = tuple((batch, length) for length in (128, 256, 64) for batch in (1, 64, 8, 256))
    """Batch and length, the one most worth knowing first."""
    compiled: Sequence[tuple[int, int]] = ((1, 128), (64, 128))
    concurrencies: Sequence[int] = (1, 2, 4, 8, 16, 32)
    rounds: int = 30
    """At batch 1 three times as many."""
    seconds: float = 2.0
    """Of each concurrency."""
    pretends: bool = False


PRETENDED = Sizes(((1, 16), (4, 32)), ((2, 16),), (1, 4), 3, 0.05, True)


Extra = Callable[[Sequence[Arrays]], Runnable]


@dataclass
class Result:
    """What a step has found, in a file that is always whole."""

    path: Path
    facts: dict[str, Any]
    cells: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)
    fell_back: list[str] = field(default_factory=list)
    """What ran elsewhere than it was to; ONNX Runtime never does, it is refused then."""

    def add(self, **cell: Any) -> None:
        self.cells.append(cell)
        self.write("unfinished")

    def write(self, status: str, reason: str = "", **more: Any) -> None:
        found = {"cells": self.cells, "not_run": self.not_run, "fell_back": self.fell_back}
        write_json(self.path, finite({**self.facts, "status": status, "reason": reason, **more, **found}))


def parity(pairs: Sequence[Pair], sizes: Sizes, result: Result) -> str:
    """Every graph against the model's stored answers, captured and not; what it says is a line for people."""
    wrong = count = 0
    for pair in (pair for pair in pairs if pair.facts["parity"]):
        for precision, captured in ((each, captured) for each in GPU_PRECISIONS for captured in (True, False)):
            on_cpu = pair.facts["on_cpu"][precision]
            try:
                found = pair.agreements(precision, captured=captured)
            except RekdError as error:
                result.not_run.append({"name": f"{pair.name} {precision}, captured {captured}", "reason": str(error)})
                continue
            for role, agreement in found.items():
                beyond = beyond_limits(agreement, precision, on_cpu.get(role))
                wrong, count = wrong + bool(beyond), count + 1
                result.add(pair=pair.name, precision=precision, captured=captured, role=role, beyond=beyond,
                           agreement=agreement.to_dict(), on_cpu=on_cpu.get(role))  # fmt: skip
    return f"{count - wrong} of {count} graphs answer as the model, {len(result.not_run)} did not run"


def latency(pairs: Sequence[Pair], sizes: Sizes, result: Result, precision: str) -> str:
    """ONNX Runtime, captured and not, beside PyTorch where it has CUDA, in rounds."""
    return timed_cells(pairs, sizes, result, sizes.cells, precision, (PYTORCH, PYTORCH_GRAPHS))


def compiled(pairs: Sequence[Pair], sizes: Sizes, result: Result) -> str:
    """torch.compile, beside what it has to beat; a shape takes it many seconds, so few shapes."""
    if reason := no_torch_cuda():
        raise Skipped(reason)
    return timed_cells(pairs, sizes, result, sizes.compiled, "fp32", (COMPILED, PYTORCH_GRAPHS))


def pytorch(pairs: Sequence[Pair], sizes: Sizes, result: Result) -> str:
    """PyTorch alone, where the interpreter with ONNX Runtime for GPUs has none that is for GPUs."""
    reason = no_torch_cuda()
    if reason and not (sizes.pretends and "has no CUDA" in reason):
        raise Skipped(reason)
    if not reason and "onnxruntime-gpu" in result.facts["hardware"]:
        raise Skipped("PyTorch was timed beside ONNX Runtime, in the steps before")
    return timed_cells(pairs, sizes, result, sizes.cells, "fp32", (PYTORCH, PYTORCH_GRAPHS), onnx=False)


def concurrency(pairs: Sequence[Pair], sizes: Sizes, result: Result) -> str:
    """Threads of one process that share a captured chain, a text each."""
    (pair,) = (pair for pair in pairs if pair.name == "equal")
    batches = _padded(1, sizes.cells[0][1], pair)
    for precision, roles in ((each, roles) for each in reversed(GPU_PRECISIONS) for roles in (SINGLE, BOTH)):
        with DeviceChain(pair.graphs(precision, roles), outputs=("mask", "scores", "probabilities")) as chain:
            for clients in sizes.concurrencies:
                load = closed_loop(
                    lambda number, run=chain.run: run(batches[number % AT_HAND]), concurrency=clients,
                    seconds=sizes.seconds, warmup_seconds=sizes.seconds / 4,
                )  # fmt: skip
                found = {key: value for key, value in load.figures().items() if key != "answers"}
                result.add(precision=precision, graphs=len(roles), concurrency=clients, answered=load.answered, **found)
    return f"{len(result.cells)} cells"


def timed_cells(
    pairs: Sequence[Pair], sizes: Sizes, result: Result, cells: Sequence[tuple[int, int]], precision: str,
    runtimes: Sequence[str], *, onnx: bool = True, extra: Sequence[Extra] = (),
) -> str:  # fmt: skip
    """Time every pair that is there to be timed.

    Args:
        runtimes: of PyTorch.
        onnx: with ONNX Runtime.
        extra: further variants, made of a cell's batches.
    """
    timed = [pair for pair in pairs if "model" in pair.facts]
    reason = no_torch_cuda()
    device = "cuda" if not reason else "cpu"
    networks = []
    if runtimes and (not reason or not onnx):
        networks = [Networks(each.facts["model"], network(each.facts), roles_of(each)) for each in timed]
    elif runtimes:
        result.not_run.append({"name": f"PyTorch {precision}", "reason": reason})
    if networks and device == "cpu":
        result.fell_back.append("PyTorch ran on the CPU")
        runtimes = [PYTORCH]
    with ExitStack() as stack:
        loaded = Loaded(stack, "cuda", None)
        for pair in timed if onnx else []:
            for roles in (roles_of(pair), SINGLE) if pair.facts["single"] else (roles_of(pair),):
                variant = Variant("", pair.facts["model"], precision, len(roles), kept_of(pair))
                loaded.add_graphs(variant, pair.graphs(precision, roles))
        result.not_run += [each._asdict() for each in loaded.not_run]
        for batch, length in cells:
            batches = _padded(batch, length, timed[0])
            ready, refused = [*loaded.runnables(batches), *(make(batches) for make in extra)], []
            for each in networks:
                found, missing = pytorch_runnables(each, batches, device, runtimes, precision=precision)
                ready, refused = ready + found, refused + missing
            working = []
            for each in ready:
                try:
                    each.run(0)
                    working.append(each)
                except RekdError as error:
                    refused.append((each.variant.name, str(error)))
            result.not_run += [
                {"name": f"{name}, batch {batch}, length {length}", "reason": said} for name, said in refused
            ]
            if working:
                result.add(batch=batch, length=length, **_timed(working, batch, batches, sizes))
    if not result.cells:
        raise BenchmarkError(f"nothing ran: {result.not_run[-1]['reason'] if result.not_run else 'no cells'}")
    return f"{len(result.cells)} of {len(cells)} cells, {len(result.not_run)} did not run"


def _timed(ready: list[Runnable], batch: int, batches: list[Arrays], sizes: Sizes) -> dict[str, Any]:
    """Times of the variants, and ratios to what each is compared with."""
    rounds = sizes.rounds * (3 if batch == 1 else 1)
    runs = {each.variant.name: each.run for each in ready}
    timings = in_rounds(runs, rounds=rounds, warmup_seconds=sizes.seconds / 40)
    variants = {each.variant for each in ready}
    ratios = []
    for variant in (each.variant for each in ready):
        plain = {"model": CLASSIFIER, "graphs": 1, "kept": None}
        classifier = replace(variant, **plain)
        others = [classifier, replace(classifier, runtime=PYTORCH_GRAPHS), replace(variant, graphs=2)]
        runtimes = (PYTORCH, PYTORCH_GRAPHS, ONNX_GRAPHS)
        others += [replace(variant, runtime=runtime, graphs=graphs) for runtime in runtimes
                   for graphs in sorted({variant.graphs, 2})]  # fmt: skip
        ratios += [
            {"way": variant.name, "baseline": other.name, **timings.ratio(variant.name, other.name)}
            for other in dict.fromkeys(others) if other in variants and other != variant
        ]  # fmt: skip
    real = np.mean([each["attention_mask"].mean() for each in batches])
    return {
        "rounds": rounds, "real_tokens": round(float(real), 3), "ratios": ratios,
        "ways": [
            {**each.variant.to_dict(), "milliseconds": with_interval(timings.milliseconds[each.variant.name])}
            for each in ready
        ],
    }  # fmt: skip


def beyond_limits(agreement: Agreement, precision: str, on_cpu: dict[str, Any] | None) -> list[str]:
    """What forbids to call a graph or an engine the model; empty where it is.

    Args:
        on_cpu: how far the same graph is from the model on a CPU.
    """
    if on_cpu is None:
        return ["there is nothing to hold it others"]
    return complaints(agreement, verification_limits({"limits": asdict(limits_of(precision)), **on_cpu}))


def roles_of(pair: Pair) -> tuple[str, ...]:
    """The graphs that answer one after another."""
    return PREDICTOR if pair.facts["model"] == CLASSIFIER else BOTH


def kept_of(pair: Pair) -> int | None:
    """K, where a form's name has it."""
    return pair.facts["kept"] if pair.facts["model"] == COMPACTED else None


def _padded(batch: int, length: int, pair: Pair) -> list[Arrays]:
    """Random words; the longest text of a batch fills it, the others a quarter of it and more, so some is padding."""
    generator, found = np.random.default_rng(0), []
    words = 30_000 if "size" in pair.facts else 60
    for _ in range(AT_HAND):
        real = generator.integers(length // 4, length + 1, batch)
        real[0] = length
        mask = (np.arange(length) < real[:, None]).astype(np.int64)
        found.append({"input_ids": generator.integers(4, words, (batch, length)) * mask, "attention_mask": mask})
    return found
