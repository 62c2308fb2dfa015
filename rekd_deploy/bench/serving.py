"""What a served answer costs: the ensemble under load, where the time goes, and what the same costs in process.

    figures.closed[]         concurrency; load figures; ``steps``: by model, from the server (see server_steps)
    figures.open[]           rate (asked, a second), share_of_peak; load figures; ``late_ms``: how late they were sent
    figures.perf_analyzer[]  see perf_analyzer; ``perf_analyzer_not_run``: why there are none
    figures.in_process       one at a time, in turns with the client: ``milliseconds`` of both, ``ratio`` with interval

Load figures: ``milliseconds`` (p50 with low and high, p90, p95, p99, max), ``per_second``, ``answers``, ``failed``,
``errors``. Times of the client include tokenising and reading the rationale back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench.interleaved import interleaved
from rekd_deploy.bench.latency_figures import with_interval
from rekd_deploy.bench.load import Ask, Load, closed_loop, open_loop, poisson_arrivals
from rekd_deploy.bench.machine_state import machine_state
from rekd_deploy.bench.perf_analyzer import run_perf_analyzer
from rekd_deploy.bench.progress import Progress, silent
from rekd_deploy.bench.results import Check
from rekd_deploy.bench.server_steps import read_totals, steps_between
from rekd_deploy.client import Client
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.pipeline import Pipeline
from rekd_deploy.server import TritonServer
from rekd_deploy.triton_config import ENSEMBLE
from rekd_train.errors import MissingExtraError
from rekd_train.preprocessors import Preprocessor

_LATE = 0.25
"""Share of the median latency that requests of an open loop may be sent late, before its figures are doubted."""
_PERF_WINDOW = 50
"""Answers in a window of perf_analyzer."""
_PERF_TIMEOUT = 120.0


@dataclass(frozen=True)
class Serving:
    """How it is measured."""

    repository: Path
    items: Sequence[Any]
    """Texts or images, asked about one by one, in turns."""
    url: str | None = None
    """Of a server that runs, gRPC, HOST:PORT; None: one is started for it, and stopped."""
    concurrencies: Sequence[int] = (1, 2, 4, 8)
    shares: Sequence[float] = (0.5, 0.8)
    """Rates of the open loop, in shares of the closed loop's highest throughput."""
    rates: Sequence[float] = ()
    """Rates in requests a second, in place of ``shares``."""
    seconds: float = 5.0
    """Of each load."""
    warmup_seconds: float = 1.0
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
        items = serving.items

        def ask(number: int) -> object:
            return client.predict([items[number % len(items)]])

        closed = _closed(serving, url, ask, progress)
        opened = _open(serving, ask, max(each["per_second"] for each in closed), progress)
        pipeline = stack.enter_context(Pipeline(serving.repository))
        figures = {
            "closed": closed,
            "open": opened,
            **_perf_analyzer(serving, url, pipeline.preprocessor, progress),
            "in_process": _in_process(serving, ask, pipeline, progress),
            "machine": {"before": before, "after": machine_state()},
        }
    return figures, _checks(figures)


def load_figures(load: Load) -> dict[str, Any]:
    """A load for JSON; no latencies where everything failed."""
    times = load.milliseconds
    return {
        "milliseconds": {**with_interval(times), "max": float(times.max())} if len(times) else None,
        "per_second": load.per_second,
        "answers": len(times),
        "failed": load.failed,
        "errors": load.errors,
    }


def _closed(serving: Serving, url: str, ask: Ask, progress: Progress) -> list[dict[str, Any]]:
    found = []
    for number, concurrency in enumerate(serving.concurrencies):
        progress("closed loop", number, len(serving.concurrencies))
        before = read_totals(url)
        load = closed_loop(
            ask, concurrency=concurrency, seconds=serving.seconds, warmup_seconds=serving.warmup_seconds
        )
        steps = steps_between(before, read_totals(url))
        found.append({"concurrency": concurrency, **load_figures(load), "steps": steps})
    progress("closed loop", len(serving.concurrencies), len(serving.concurrencies))
    return found


def _open(serving: Serving, ask: Ask, peak: float, progress: Progress) -> list[dict[str, Any]]:
    rates = list(serving.rates) or [share * peak for share in serving.shares]
    found = []
    for number, rate in enumerate(rates):
        progress("open loop", number, len(rates))
        arrivals = poisson_arrivals(rate, serving.warmup_seconds + serving.seconds, serving.seed + number)
        load = open_loop(ask, arrivals, warmup_seconds=serving.warmup_seconds)
        late = float(np.percentile(load.late_ms, 99)) if len(load.late_ms) else None
        found.append({"rate": rate, "share_of_peak": rate / peak if peak else None, **load_figures(load),
                      "late_ms": {"p99": late}})  # fmt: skip
    progress("open loop", len(rates), len(rates))
    return found


def _in_process(serving: Serving, ask: Ask, pipeline: Pipeline, progress: Progress) -> dict[str, Any]:
    """One question at a time to both, in turns."""
    ways = {
        "served": ask,
        "in process": lambda number: pipeline.predict([serving.items[number % len(serving.items)]]),
    }
    timings = interleaved(
        ways, rounds=serving.rounds, warmup_seconds=min(0.5, serving.warmup_seconds),
        report=lambda done: progress("against in process", done, serving.rounds),
    )  # fmt: skip
    return {
        "milliseconds": {name: with_interval(timings.milliseconds[name]) for name in ways},
        "ratio": {"way": "served", "baseline": "in process", **timings.ratio("served", "in process")},
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


def _checks(figures: dict[str, Any]) -> list[Check]:
    loads = [*figures["closed"], *figures["open"]]
    failed, answers = sum(load["failed"] for load in loads), sum(load["answers"] for load in loads)
    late = [
        load for load in figures["open"]
        if load["milliseconds"] and load["late_ms"]["p99"] > _LATE * load["milliseconds"]["p50"]
    ]  # fmt: skip
    note = next((f": {load['errors'][0]}" for load in loads if load["errors"]), "")
    return [
        Check(
            name="every request was answered", outcome="failed" if failed or not answers else "passed",
            words=f"{answers:,} answers, {failed:,} failures{note}", value=float(failed), limit=0.0,
        ),
        Check(
            name="arrivals were on time", outcome="not applicable" if late or not figures["open"] else "passed",
            words="; ".join(
                f"at {load['rate']:.0f} a second 1 % of the requests were sent {load['late_ms']['p99']:.0f} ms late or "
                "more: the machine was too busy to ask so much, and the latency is that of both"
                for load in late
            ) or f"requests were sent within {_LATE:.0%} of the median latency of their moments",
        ),
    ]  # fmt: skip


