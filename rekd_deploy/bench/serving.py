"""What a served answer costs: the ensemble under load, where the time goes, and what the same costs in process.

    figures.closed[]         see closed_turns: load, the server's steps, equal answers, the pipeline in process
    figures.open[]           rate (asked, a second), share_of_peak; load figures; ``equal``, ``compared``; ``late_ms``:
                             how late they were sent
    figures.perf_analyzer[]  see perf_analyzer; ``perf_analyzer_not_run``: why there are none
    figures.in_process       one item at a time, in turns with the client: ``milliseconds`` of both, ``ratio`` with
                             interval, ``added_ms``: the median of the rounds' differences, with interval

Times of the client include tokenising and reading the rationale back. ``per_second`` counts requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench.closed_turns import ClosedTurns, load_figures
from rekd_deploy.bench.interleaved import interleaved, median_interval
from rekd_deploy.bench.latency_figures import with_interval
from rekd_deploy.bench.load import Ask, open_loop, poisson_arrivals
from rekd_deploy.bench.machine_state import machine_state
from rekd_deploy.bench.perf_analyzer import run_perf_analyzer
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.request_mix import Recorded, RequestMix
from rekd_deploy.bench.results import Check
from rekd_deploy.bench.serving_checks import serving_checks
from rekd_deploy.client.client import Client
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.repository.config import ENSEMBLE
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.server.server import TritonServer
from rekd_train.errors import MissingExtraError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor

_PERF_WINDOW = 50
"""Answers in a window of perf_analyzer."""
_PERF_TIMEOUT = 120.0


@dataclass(frozen=True)
class Serving:
    """How it is measured."""

    repository: Path
    items: Sequence[Any]
    """Texts or images to ask about."""
    batches: Sequence[int] = (1,)
    """How many of them a request asks about; each request has one of these sizes, drawn once for all."""
    url: str | None = None
    """Of a server that runs, gRPC, HOST:PORT; None: one is started for it, and stopped."""
    concurrencies: Sequence[int] = (1, 2, 4, 8)
    shares: Sequence[float] = (0.5, 0.8)
    """Rates of the open loop, in shares of the closed loop's highest throughput."""
    rates: Sequence[float] = ()
    """Rates in requests a second, in place of ``shares``."""
    seconds: float = 5.0
    """Of each load."""
    turns: int = 3
    """How often the closed loop changes between served and in process."""
    warmup_seconds: float = 1.0
    """Of each load, and of each turn."""
    rounds: int = 50
    """Of the client against the pipeline in process."""
    perf_analyzer: bool = True
    seed: int = 0


def measure_serving(serving: Serving, progress: Progress = silent) -> tuple[dict[str, Any], list[Check]]:
    """Figures and checks, as described above.

    Raises:
        BenchmarkError: nothing to ask about.
        RepositoryError, ServerError, ClientError: it cannot be served, or does not answer.
    """
    if not serving.items:
        raise BenchmarkError("there is nothing to ask about; give at least one text or image")
    before = machine_state()
    with ExitStack() as stack:
        url = serving.url
        if url is None:
            progress("server", 0, 1)
            server = TritonServer(serving.repository, grpc_port=0, http_port=0, metrics_port=0)
            url = stack.enter_context(server).grpc_url
            progress("server", 1, 1)
        client = stack.enter_context(Client(url))
        pipeline = stack.enter_context(Pipeline(serving.repository))
        mix = RequestMix(serving.items, serving.batches, serving.seed)
        turns = ClosedTurns(
            mix=mix, served=client.predict, in_process=None if serving.url else pipeline.predict,
            expected=pipeline.predict(serving.items), bias=_bias(serving.repository), seconds=serving.seconds,
            warmup_seconds=serving.warmup_seconds, turns=serving.turns,
        )  # fmt: skip
        closed = _closed(serving, turns, url, progress)
        peak = max(each["per_second"] for each in closed)
        figures = {
            "closed": closed,
            "open": _open(serving, turns, peak, progress),
            **_perf_analyzer(serving, url, pipeline.preprocessor, progress),
            "in_process": _in_process(serving, client, pipeline, progress),
            "machine": {"before": before, "after": machine_state()},
        }
    return figures, serving_checks(figures, given=serving.url is not None)


def _bias(repository: Path) -> float | None:
    """Of the decision rule that the graphs hold."""
    return SelectionPolicy.model_validate(read_manifest(repository)["policy"]).bias


def _closed(serving: Serving, turns: ClosedTurns, url: str, progress: Progress) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    total = len(serving.concurrencies) * serving.turns
    for concurrency in serving.concurrencies:
        begun = len(found) * serving.turns
        found.append(
            turns.measure(concurrency, url, lambda done, begun=begun: progress("closed loop", begun + done, total))
        )
    return found


def _open(serving: Serving, turns: ClosedTurns, peak: float, progress: Progress) -> list[dict[str, Any]]:
    served = Recorded(turns.mix, turns.served)
    rates = list(serving.rates) or [share * peak for share in serving.shares if peak]
    found = []
    for number, rate in enumerate(rates):
        progress("open loop", number, len(rates))
        arrivals = poisson_arrivals(rate, serving.warmup_seconds + serving.seconds, serving.seed + number)
        load = open_loop(served, arrivals, warmup_seconds=serving.warmup_seconds)
        equal, compared = served.judge(turns.expected, turns.bias)
        late = float(np.percentile(load.late_ms, 99)) if len(load.late_ms) else None
        found.append({"rate": rate, "share_of_peak": rate / peak if peak else None, **load_figures(load),
                      "late_ms": {"p99": late}, "equal": equal, "compared": compared})  # fmt: skip
    progress("open loop", len(rates), len(rates))
    return found


def _in_process(serving: Serving, client: Client, pipeline: Pipeline, progress: Progress) -> dict[str, Any]:
    """One item at a time to both, in turns."""

    def alone(number: int) -> list[Any]:
        return [serving.items[number % len(serving.items)]]

    ways: dict[str, Ask] = {
        "served": lambda number: client.predict(alone(number)),
        "in process": lambda number: pipeline.predict(alone(number)),
    }
    timings = interleaved(
        ways, rounds=serving.rounds, warmup_seconds=min(0.5, serving.warmup_seconds),
        report=lambda done: progress("against in process", done, serving.rounds),
    )  # fmt: skip
    added = timings.milliseconds["served"] - timings.milliseconds["in process"]
    low, high = median_interval(added)
    return {
        "milliseconds": {name: with_interval(timings.milliseconds[name]) for name in ways},
        "ratio": {"way": "served", "baseline": "in process", **timings.ratio("served", "in process")},
        "added_ms": {"p50": float(np.median(added)), "low": low, "high": high},
    }


def _perf_analyzer(serving: Serving, url: str, preprocessor: Preprocessor, progress: Progress) -> dict[str, Any]:
    if not serving.perf_analyzer:
        return {"perf_analyzer": [], "perf_analyzer_not_run": "it was not asked for"}
    total = len(serving.concurrencies)
    progress("perf_analyzer", 0, total)
    try:
        found = run_perf_analyzer(
            url, ENSEMBLE, _one_shape(preprocessor, serving.items), serving.concurrencies,
            request_count=_PERF_WINDOW, timeout=_PERF_TIMEOUT,
        )  # fmt: skip
    except (BenchmarkError, MissingExtraError) as error:  # a second opinion: without it the rest is still worth having
        return {"perf_analyzer": [], "perf_analyzer_not_run": str(error)}
    progress("perf_analyzer", total, total)
    return {"perf_analyzer": found, "perf_analyzer_not_run": None}


def _one_shape(preprocessor: Preprocessor, items: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Requests of the shape that most of the items have."""
    requests = [dict(preprocessor([item]).inputs) for item in items]
    shapes = [tuple(array.shape for array in request.values()) for request in requests]
    usual = max(shapes, key=shapes.count)
    return [request for request, shape in zip(requests, shapes, strict=True) if shape == usual]
