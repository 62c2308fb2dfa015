"""What a served response costs: the ensemble under load, where the time goes, and what the same costs in process.

    figures.closed[]         a concurrency
        load figures         of the served model: see ``Load.figures``
        steps                by model, from the server's statistics
        equal, compared      predictions that are the pipeline's own, and all, those of the warm-ups among them
        in_process           load figures of the same pipeline, called by as many threads with the same requests
        throughput           served in units of in process: ``ratio``, the median of the rounds', ``low`` and ``high``
    figures.open[]           rate (wanted, a second), share_of_peak; load figures; ``equal``, ``compared``; ``late_ms``:
                             how late they were sent
    figures.perf_analyzer[]  see ``run_perf_analyzer``; ``perf_analyzer_not_run``: why there are none
    figures.in_process       one item at a time, in turn with the client: ``milliseconds`` of both, ``ratio`` with
                             interval, ``added_ms``: the median of the rounds' differences, with interval

``closed[].in_process`` and ``throughput`` are null where the server was given: it may run elsewhere. Times of the
client include tokenising and reading the rationale back. ``per_second`` counts requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench.load import (
    Load,
    Recorded,
    RequestMix,
    Send,
    closed_loop,
    merged,
    open_loop,
    poisson_arrivals,
)
from rekd_deploy.bench.results import Check, Progress, machine_state, not_applicable, silent
from rekd_deploy.bench.triton import read_totals, run_perf_analyzer, steps_between
from rekd_deploy.bench.variants import in_rounds, median_figures, with_interval
from rekd_deploy.client.client import Client
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.repository.config import ENSEMBLE
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.server.server import TritonServer
from rekd_train.errors import MissingExtraError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import Preprocessor

LEAST_THROUGHPUT = 0.85
"""Served in units of in process, with the most clients."""
MOST_ADDED_MS = 2.5
"""What the server adds to one request at a time, median."""
SMALL_MS = 10.0
"""A model that is faster in process is too small for the share: the way of a request outweighs its prediction."""
_LATE = 0.25
"""Share of the median latency that requests of an open loop may be sent late, before its figures are doubted."""
_PERF_WINDOW = 50
"""Responses in a window of perf_analyzer."""
_PERF_TIMEOUT = 120.0


@dataclass(frozen=True)
class Serving:
    """How it is measured."""

    repository: Path
    items: Sequence[Any]
    """Texts or images of the requests."""
    batches: Sequence[int] = (1,)
    """How many of them a request holds; each request has one of these sizes, drawn once for all."""
    url: str | None = None
    """Of a server that runs, gRPC, HOST:PORT; None: one is started for it, and stopped."""
    concurrencies: Sequence[int] = (1, 2, 4, 8)
    shares: Sequence[float] = (0.5, 0.8)
    """Request rates of the open loop as fractions of peak throughput."""
    rates: Sequence[float] = ()
    """Rates in requests a second, in place of ``shares``."""
    seconds: float = 5.0
    """Of each load."""
    turns: int = 3
    """How often the closed loop changes between served and in process."""
    warmup_seconds: float = 1.0
    """Of each load, and of each turn."""
    rounds: int = 50
    """Of the client beside the pipeline in process."""
    perf_analyzer: bool = True
    seed: int = 0


def measure_serving(serving: Serving, progress: Progress = silent) -> tuple[dict[str, Any], list[Check]]:
    """Figures and checks, as described above.

    Raises:
        BenchmarkError: no items.
        RepositoryError, ServerError, ClientError: it cannot be served, or does not answer.
    """
    if not serving.items:
        raise BenchmarkError("there is nothing to send; give at least one text or image")
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
        bias = SelectionPolicy.model_validate(read_manifest(serving.repository)["policy"]).bias
        mix = RequestMix(serving.items, serving.batches, serving.seed)
        served = Recorded(mix, client.predict, pipeline.predict(serving.items), bias)
        there = None if serving.url else lambda number: pipeline.predict(mix(number))
        closed = [_closed(serving, served, there, index, url, progress) for index in range(len(serving.concurrencies))]
        peak = max(each["per_second"] for each in closed)
        figures = {
            "closed": closed,
            "open": _open(serving, served, peak, progress),
            **_perf_analyzer(serving, url, pipeline.preprocessor, progress),
            "in_process": _in_process(serving, client, pipeline, progress),
            "machine": {"before": before, "after": machine_state()},
        }
    return figures, serving_checks(figures, given=serving.url is not None)


def _closed(
    serving: Serving, served: Recorded, there: Send | None, index: int, url: str, progress: Progress
) -> dict[str, Any]:
    """An entry of ``closed``: rounds alternate with the pipeline's, so that a noisy machine disturbs both alike."""
    sends: dict[str, Send] = {"served": served} if there is None else {"served": served, "in process": there}
    loads: dict[str, list[Load]] = {name: [] for name in sends}
    counts, before = np.zeros(2, int), read_totals(url)
    for number in range(serving.turns):
        for name in list(sends) if number % 2 == 0 else reversed(sends):
            loads[name].append(closed_loop(
                sends[name], concurrency=serving.concurrencies[index], seconds=serving.seconds / serving.turns,
                warmup_seconds=serving.warmup_seconds,
            ))  # fmt: skip
        counts += served.compare()
        progress("closed loop", index * serving.turns + number + 1, len(serving.concurrencies) * serving.turns)
    steps, beside, ratio = steps_between(before, read_totals(url)), loads.get("in process", []), None
    if beside and all(load.per_second for load in beside):
        pairs = zip(loads["served"], beside, strict=True)
        ratio = median_figures(np.array([ours.per_second / theirs.per_second for ours, theirs in pairs]), "ratio")
    return {
        "concurrency": serving.concurrencies[index], **merged(loads["served"]).figures(), "steps": steps,
        "equal": int(counts[0]), "compared": int(counts[1]),
        "in_process": merged(beside).figures() if beside else None, "throughput": ratio,
    }  # fmt: skip


def _open(serving: Serving, served: Recorded, peak: float, progress: Progress) -> list[dict[str, Any]]:
    rates = list(serving.rates) or [share * peak for share in serving.shares if peak]
    found = []
    for number, rate in enumerate(rates):
        progress("open loop", number, len(rates))
        arrivals = poisson_arrivals(rate, serving.warmup_seconds + serving.seconds, serving.seed + number)
        load = open_loop(served, arrivals, warmup_seconds=serving.warmup_seconds)
        equal, compared = map(int, served.compare())
        late = float(np.percentile(load.late_ms, 99)) if load.late_ms else None
        found.append({"rate": rate, "share_of_peak": rate / peak if peak else None, **load.figures(),
                      "late_ms": {"p99": late}, "equal": equal, "compared": compared})  # fmt: skip
    progress("open loop", len(rates), len(rates))
    return found


def _in_process(serving: Serving, client: Client, pipeline: Pipeline, progress: Progress) -> dict[str, Any]:
    """One item at a time to both, in turn."""

    def alone(number: int) -> list[Any]:
        return [serving.items[number % len(serving.items)]]

    sends: dict[str, Send] = {
        "served": lambda number: client.predict(alone(number)),
        "in process": lambda number: pipeline.predict(alone(number)),
    }
    timings = in_rounds(
        sends, rounds=serving.rounds, warmup_seconds=min(0.5, serving.warmup_seconds),
        report=lambda done: progress("against in process", done, serving.rounds),
    )  # fmt: skip
    times = timings.milliseconds
    return {
        "milliseconds": {name: with_interval(times[name]) for name in sends},
        "ratio": {"way": "served", "baseline": "in process", **timings.ratio("served", "in process")},
        "added_ms": median_figures(times["served"] - times["in process"]),
    }


def _perf_analyzer(serving: Serving, url: str, preprocessor: Preprocessor, progress: Progress) -> dict[str, Any]:
    """On requests of the shape that most of the items have."""
    if not serving.perf_analyzer:
        return {"perf_analyzer": [], "perf_analyzer_not_run": "it was not asked for"}
    total = len(serving.concurrencies)
    progress("perf_analyzer", 0, total)
    requests = [dict(preprocessor([item]).inputs) for item in serving.items]
    shapes = [tuple(array.shape for array in request.values()) for request in requests]
    usual = max(shapes, key=shapes.count)
    alike = [request for request, shape in zip(requests, shapes, strict=True) if shape == usual]
    try:
        found = run_perf_analyzer(
            url, ENSEMBLE, alike, serving.concurrencies, request_count=_PERF_WINDOW, timeout=_PERF_TIMEOUT
        )
    except (BenchmarkError, MissingExtraError) as error:  # a second opinion: without it the rest is still worth having
        return {"perf_analyzer": [], "perf_analyzer_not_run": str(error)}
    progress("perf_analyzer", total, total)
    return {"perf_analyzer": found, "perf_analyzer_not_run": None}


# checks


def serving_checks(figures: dict[str, Any], *, given: bool) -> list[Check]:
    """Checks of the figures of ``serving``.

    Args:
        given: the server was given, and may be another machine's: its speed is not compared with this one's.
    """
    loads = [*figures["closed"], *figures["open"]]
    failed, count, equal, compared = (
        sum(load.get(key, 0) for load in loads) for key in ("failed", "answers", "equal", "compared")
    )
    note = next((f": {load['errors'][0]}" for load in loads if load["errors"]), "")
    return [
        Check(
            name="every request was answered", outcome="failed" if failed or not count else "passed",
            words=f"{count:,} answers, {failed:,} failures{note}", value=float(failed), limit=0.0,
        ),
        Check(
            name="served answers are the pipeline's", outcome="passed" if compared and equal == compared else "failed",
            words=f"{equal:,} of {compared:,} have the label, the rationale and, within 1e-4, the probabilities that "
            "the pipeline gives in process",
            value=float(compared - equal), limit=0.0,
        ),
        *_costs(figures, given), _on_time(figures["open"]),
    ]  # fmt: skip


def _costs(figures: dict[str, Any], given: bool) -> list[Check]:
    names = "throughput beside the pipeline's", "what serving adds to one question"
    load = max(figures["closed"], key=lambda load: load["concurrency"])
    ratio = load["throughput"]
    if given or ratio is None:
        short = "a turn was over before an answer was counted in process; fix: longer --seconds or fewer --turns"
        why = "the server was given: it may be another machine" if given else short
        return [not_applicable(name, why) for name in names]
    added, alone = figures["in_process"]["added_ms"], figures["in_process"]["milliseconds"]["in process"]["p50"]
    fair = "failed" if alone >= SMALL_MS else "not applicable"
    return [
        Check(
            name=names[0], outcome="passed" if ratio["ratio"] >= LEAST_THROUGHPUT else fair,
            words=f"with {load['concurrency']} clients {load['per_second']:.1f} requests a second, "
            f"{load['in_process']['per_second']:.1f} in process: {ratio['ratio']:.2f} of it "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})",
            value=ratio["ratio"], limit=LEAST_THROUGHPUT,
        ),
        Check(
            name=names[1], outcome="passed" if added["p50"] <= MOST_ADDED_MS else "failed",
            words=f"{added['p50']:.2f} ms more than in process ({added['low']:.2f} to {added['high']:.2f})",
            value=added["p50"], limit=MOST_ADDED_MS,
        ),
    ]  # fmt: skip


def _on_time(opened: list[dict[str, Any]]) -> Check:
    name = "arrivals were on time"
    if not opened:
        return not_applicable(name, "there was no open loop: no rates, or no response within a round of the closed one")
    late = "; ".join(
        f"at {load['rate']:.0f} a second 1 % of the requests were sent {load['late_ms']['p99']:.0f} ms late or more: "
        "the machine was too busy to send so many, and the latency is that of both"
        for load in opened if load["milliseconds"] and load["late_ms"]["p99"] > _LATE * load["milliseconds"]["p50"]
    )  # fmt: skip
    if late:
        return not_applicable(name, late)
    words = f"requests were sent within {_LATE:.0%} of the median latency of their moments"
    return Check(name=name, outcome="passed", words=words)
