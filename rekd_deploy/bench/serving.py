"""What a served response costs: the ensemble under load, where the time goes, and what the same costs in process.

    figures.closed[]    concurrency; load figures (``Load.figures``); ``steps`` by model, from the server's statistics;
                        ``equal`` to the pipeline's predictions, of those ``compared``; and, null where
                        the server was given (it may run elsewhere), ``in_process``, load figures of as many threads
                        that call the pipeline, and ``throughput`` served in units of it, with interval
    figures.open[]      rate (wanted, a second), share_of_peak; load figures; equal, compared
    figures.in_process  one item at a time, alternating with the client: ``milliseconds`` of both, ``ratio`` and
                        ``added_ms``, medians over rounds with interval

Times of the client include tokenising and reading the rationale back. ``per_second`` counts requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench import timing
from rekd_deploy.bench.results import Check, Progress, not_applicable, silent, verdict
from rekd_deploy.client.client import Client
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.parity.reference import agreement
from rekd_deploy.repository.config import ENSEMBLE
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.status import StepTotals
from rekd_train.errors import ConfigError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.prediction import Prediction

LEAST_THROUGHPUT = 0.85
"""Served in units of in process, with the most clients."""
MOST_ADDED_MS = 2.5
"""What the server adds to one request at a time, median."""
SMALL_MS = 10.0
"""A model that is faster in process is too small for the share: the way of a request outweighs its prediction."""
_DRAWN = 1009
"""Different requests before they repeat; a prime, so that clients in step do not get the same few."""


@dataclass(frozen=True)
class Serving:
    """How it is measured; see ``rekd-bench serving --help``."""

    repository: Path
    items: Sequence[Any]
    """Texts or images of the requests."""
    batches: Sequence[int] = (1,)
    url: str | None = None
    """Of a server that runs, gRPC, HOST:PORT; None: one is started for it, and stopped."""
    concurrencies: Sequence[int] = (1, 2, 4, 8)
    shares: Sequence[float] = (0.5, 0.8)
    seconds: float = 5.0
    turns: int = 3
    warmup_seconds: float = 1.0
    """Of each load, and of each turn."""
    rounds: int = 50
    seed: int = 0


def measure_serving(serving: Serving, progress: Progress = silent) -> tuple[dict[str, Any], list[Check]]:
    """Figures and checks, as described above.

    Raises:
        BenchmarkError: no items.
        RepositoryError, ServerError, ClientError: it cannot be served, or does not answer.
    """
    if not serving.items:
        raise BenchmarkError("there is nothing to send; give at least one text or image")
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
        expected = pipeline.predict(serving.items)
        served = Requests(serving.items, serving.batches, client.predict, expected, bias, serving.seed)
        there = None if serving.url else lambda number: pipeline.predict(served.of(number))
        closed = [_closed(serving, served, there, index, url, progress) for index in range(len(serving.concurrencies))]
        peak = max(each["per_second"] for each in closed)
        figures = {"closed": closed, "open": _open(serving, served, peak, progress),
                   "in_process": _in_process(serving, client, pipeline, progress)}  # fmt: skip
    return figures, serving_checks(figures, given=serving.url is not None)


def _closed(
    serving: Serving, served: Requests, there: timing.Send | None, index: int, url: str, progress: Progress
) -> dict[str, Any]:
    """An entry of ``closed``: rounds alternate with the pipeline's, so that a noisy machine disturbs both alike."""
    sends: dict[str, timing.Send] = {"served": served} if there is None else {"served": served, "in process": there}
    loads: dict[str, list[timing.Load]] = {name: [] for name in sends}
    counts, before = np.zeros(2, int), read_totals(url)
    for number in range(serving.turns):
        for name in list(sends) if number % 2 == 0 else reversed(sends):
            loads[name].append(timing.closed_loop(
                sends[name], concurrency=serving.concurrencies[index], seconds=serving.seconds / serving.turns,
                warmup_seconds=serving.warmup_seconds,
            ))  # fmt: skip
        counts += served.compare()
        progress("closed loop", index * serving.turns + number + 1, len(serving.concurrencies) * serving.turns)
    steps, beside, ratio = steps_between(before, read_totals(url)), loads.get("in process", []), None
    if beside and all(load.per_second for load in beside):
        ratios = [ours.per_second / theirs.per_second for ours, theirs in zip(loads["served"], beside, strict=True)]
        ratio = timing.median_figures(np.array(ratios), "ratio")
    return {
        "concurrency": serving.concurrencies[index], **timing.merged(loads["served"]).figures(), "steps": steps,
        "equal": int(counts[0]), "compared": int(counts[1]),
        "in_process": timing.merged(beside).figures() if beside else None, "throughput": ratio,
    }  # fmt: skip


def _open(serving: Serving, served: Requests, peak: float, progress: Progress) -> list[dict[str, Any]]:
    found = []
    for number, share in enumerate(serving.shares if peak else ()):
        progress("open loop", number, len(serving.shares))
        seconds = serving.warmup_seconds + serving.seconds
        arrivals = timing.poisson_arrivals(share * peak, seconds, serving.seed + number)
        load = timing.open_loop(served, arrivals, warmup_seconds=serving.warmup_seconds)
        equal, compared = map(int, served.compare())
        found.append({"rate": share * peak, "share_of_peak": share, **load.figures(), "equal": equal,
                      "compared": compared})  # fmt: skip
    progress("open loop", 1, 1)
    return found


def _in_process(serving: Serving, client: Client, pipeline: Pipeline, progress: Progress) -> dict[str, Any]:
    sends: dict[str, timing.Send] = {
        name: lambda number, predict=each.predict: predict([serving.items[number % len(serving.items)]])
        for name, each in (("served", client), ("in process", pipeline))
    }
    timings = timing.in_rounds(
        sends, rounds=serving.rounds, warmup_seconds=min(0.5, serving.warmup_seconds),
        report=lambda done: progress("against in process", done, serving.rounds),
    )  # fmt: skip
    times = timings.milliseconds
    return {
        "milliseconds": {name: timing.with_interval(times[name]) for name in sends},
        "ratio": {"way": "served", "baseline": "in process", **timings.ratio("served", "in process")},
        "added_ms": timing.median_figures(times["served"] - times["in process"]),
    }


# checks


def serving_checks(figures: dict[str, Any], *, given: bool) -> list[Check]:
    """Checks of the figures; the speed of a server that was given, perhaps another machine's, is not compared."""
    loads = [*figures["closed"], *figures["open"]]
    failed, count, equal, compared = (
        sum(load.get(key, 0) for load in loads) for key in ("failed", "answers", "equal", "compared")
    )
    note = next((f": {load['errors'][0]}" for load in loads if load["errors"]), "")
    answered = f"{count:,} responses, {failed:,} failures{note}"
    words = f"{equal:,} of {compared:,} have the label, the rationale and, within 1e-4, the probabilities in process"
    return [
        verdict("every request was answered", not failed and count > 0, answered, float(failed), 0.0),
        verdict("served answers are the pipeline's", 0 < compared == equal, words, float(compared - equal), 0.0),
        *_costs(figures, given),
    ]


def _costs(figures: dict[str, Any], given: bool) -> list[Check]:
    names = "throughput beside the pipeline's", "what serving adds to one request"
    load = max(figures["closed"], key=lambda load: load["concurrency"])
    ratio = load["throughput"]
    if given or ratio is None:
        why = "a round was over before a response was counted in process; fix: longer --seconds or fewer --turns"
        why = "the server was given: it may be another machine" if given else why
        return [not_applicable(name, why) for name in names]
    added, alone = figures["in_process"]["added_ms"], figures["in_process"]["milliseconds"]["in process"]["p50"]
    fast = ratio["ratio"] >= LEAST_THROUGHPUT
    words = (
        f"with {load['concurrency']} clients {load['per_second']:.1f} requests a second, "
        f"{load['in_process']['per_second']:.1f} in process: {ratio['ratio']:.2f} of it ({ratio['low']:.2f} to "
        f"{ratio['high']:.2f})"
    )
    more = f"{added['p50']:.2f} ms more than in process ({added['low']:.2f} to {added['high']:.2f})"
    return [
        verdict(names[0], fast, words, ratio["ratio"], LEAST_THROUGHPUT) if fast or alone >= SMALL_MS
        else not_applicable(names[0], words, LEAST_THROUGHPUT),
        verdict(names[1], added["p50"] <= MOST_ADDED_MS, more, added["p50"], MOST_ADDED_MS),
    ]  # fmt: skip


# requests, and whether the responses are the model's own


class Requests:
    """A fixed sequence of requests that mixes items, and so lengths, and batch sizes; sends one when called.

    Responses are kept and compared after the load, so that comparing does not disturb it.

    Args:
        items: texts or images.
        batch_sizes: each request has one of them.
        predict: called from several threads at once.
        expected: the prediction for each item.
        bias: of the decision rule, for near-ties.

    Raises:
        ConfigError: a batch size below 1.
    """

    def __init__(
        self, items: Sequence[Any], batch_sizes: Sequence[int], predict: Callable[[list[Any]], list[Prediction]],
        expected: Sequence[Prediction], bias: float | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if not batch_sizes or min(batch_sizes) < 1:
            raise ConfigError(f"batch sizes {list(batch_sizes)} make no request; give numbers from 1")
        generator = np.random.default_rng(seed)
        sizes = generator.choice(np.asarray(batch_sizes), size=_DRAWN)
        order = np.concatenate([generator.permutation(len(items)) for _ in range(int(sizes.sum()) // len(items) + 1)])
        self._indices = [part.tolist() for part in np.split(order, np.cumsum(sizes))[:_DRAWN]]
        self._items, self._predict, self._expected, self._bias = items, predict, expected, bias
        self._responses: list[tuple[int, list[Prediction]]] = []

    def of(self, number: int) -> list[Any]:
        """The items in the request of a number."""
        return [self._items[index] for index in self._indices[number % _DRAWN]]

    def __call__(self, number: int) -> None:
        self._responses.append((number, self._predict(self.of(number))))

    def compare(self) -> np.ndarray:
        """(2,) predictions equal to those expected (``agreement``), and all; then forgets them."""
        responses, self._responses = self._responses, []
        counts = np.zeros(2, int)
        for number, found in responses:
            wanted = [self._expected[index] for index in self._indices[number % _DRAWN]]
            counts += agreement(found, wanted, self._bias), len(wanted)
        return counts


# the server's own statistics


def read_totals(url: str, timeout: float = 10.0) -> dict[str, StepTotals]:
    """Triton's statistics by model, of the server at HOST:PORT, gRPC.

    Raises:
        ServerUnavailableError, ClientError: it does not answer, or does not tell.
    """
    transport = open_transport(url, timeout)
    try:
        _, _, statistics = transport.server_facts(ENSEMBLE, timeout)
    finally:
        transport.close()
    totals: dict[str, StepTotals] = {}
    for entry in statistics:
        found = StepTotals.of(entry)
        if entry["name"] not in totals or found.requests > totals[entry["name"]].requests:  # the version in use
            totals[entry["name"]] = found
    return totals


def steps_between(before: Mapping[str, StepTotals], after: Mapping[str, StepTotals]) -> dict[str, dict[str, Any]]:
    """What each model with requests did between two readings."""
    found = {name: totals.since(before.get(name)) for name, totals in after.items()}
    return {name: figures for name, figures in sorted(found.items()) if figures["requests"]}
