"""Loads: the closed and the open loop, the checks, the server's own statistics, and a real server."""

import threading
import time

import numpy as np
import pytest

from rekd_deploy.bench.serving import Requests, Serving, measure_serving, read_totals, serving_checks
from rekd_deploy.bench.timing import closed_loop, open_loop, poisson_arrivals
from rekd_deploy.cli.bench import app
from rekd_deploy.errors import BenchmarkError, DeadlineError, ServerUnavailableError
from rekd_train.errors import ConfigError
from rekd_train.inputs.prediction import Prediction

pytestmark = pytest.mark.slow

STALL = 0.4


def test_a_stall_and_a_wait_for_a_free_client_are_paid_by_all_who_come_meanwhile():
    """The closed loop sees a stall once: no client sends while it waits. The open loop must not."""

    def stalled():
        lock, seen = threading.Lock(), []
        def send(number: int) -> None:
            with lock:  # which holds up everybody
                seen.append(number)
                time.sleep(STALL * (len(seen) == 10))
        return send

    arrivals, slow = np.arange(0.0, 0.8, 0.01), STALL * 1000 / 4
    opened, closed = open_loop(stalled(), arrivals), closed_loop(stalled(), concurrency=1, seconds=0.8)
    assert (np.array(opened.milliseconds) > slow).sum() >= 20 and len(opened.milliseconds) == len(arrivals)
    assert (np.array(closed.milliseconds) > slow).sum() <= 3
    # with one client the second request is sent late, and its latency says so
    load = open_loop(lambda number: time.sleep(0.1), np.zeros(3), in_flight=1)
    assert (np.sort(load.milliseconds) >= (100, 200, 300)).all()


def test_throughput_is_of_the_time_after_the_warm_up_and_failures_have_none():
    under_way, counts = set(), []
    def send(number: int) -> None:
        under_way.add(number)
        counts.append(len(under_way))
        time.sleep(0.02)
        under_way.discard(number)
    load = closed_loop(send, concurrency=3, seconds=0.3)
    assert max(counts) == 3 and min(load.milliseconds) >= 20
    load = Slow(0.4).load(warmup_seconds=0.5)
    assert (load.answered, load.seconds) == (5, 2.0), "one of the warm-up's came within it, the last one after it"
    assert len(load.milliseconds) == 5 and load.per_second == pytest.approx(1 / 0.4), "however short the time"
    load = open_loop(lambda number: None, np.linspace(0, 0.2, 21), warmup_seconds=0.099)
    assert load.answered == 11 and 0 < load.seconds < 0.2
    load = Slow(0.5, fails_after=1.5).load()
    assert (load.answered, load.failed) == (2, 2)
    def send(number: int) -> None:
        if number % 2:
            raise DeadlineError("no response in time")
    load = open_loop(send, np.linspace(0, 0.05, 10))
    figures = load.figures()
    assert (load.answered, figures["failed"], figures["answers"]) == (5, 5, 5)
    assert figures["errors"] == ["no response in time"] and figures["milliseconds"]["p50"] >= 0
    with pytest.raises(DeadlineError):  # the first one ends the load
        closed_loop(Slow(1.0, fails_after=0.0), concurrency=1, seconds=0.1)
    with pytest.raises(DeadlineError):
        open_loop(Slow(1.0, fails_after=0.0), np.zeros(1))


class Slow:
    """A clock that each request moves on by so much."""

    def __init__(self, seconds: float, fails_after: float = np.inf) -> None:
        self.now, self._seconds, self._fails_after = 0.0, seconds, fails_after

    def __call__(self, number: int) -> None:
        self.now += self._seconds
        if self.now > self._fails_after:
            raise DeadlineError("no response in time")

    def load(self, **options):
        return closed_loop(self, concurrency=1, seconds=2.0, clock=lambda: self.now, **options)


def test_requests_are_the_same_for_all_and_a_wrong_prediction_is_seen():
    arrivals = poisson_arrivals(rate=200.0, seconds=50.0, seed=0)
    gaps = np.diff(arrivals)
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05), "exponential gaps: as much spread as mean"
    assert (poisson_arrivals(200.0, 50.0, 0) == arrivals).all() and len(poisson_arrivals(200.0, 50.0, 1)) != 0
    items, numbers = list("abcdefg"), range(200)
    requests, again = (list(map(Requests(items, (1, 4), list, [], seed=1).of, numbers)) for _ in range(2))
    assert requests == again and {len(request) for request in requests} == {1, 4}
    counts = np.bincount([items.index(item) for request in requests for item in request])
    assert counts.min() > 0.9 * counts.max(), "every item in its turn"
    served = {"a": 0.9, "b": 0.8}
    def predict(items):
        return [Prediction("x", {"x": served[item]}, [], rate=0.1, truncated=False, text=item) for item in items]
    requests = Requests(["a", "b"], (1, 2), predict, predict(["a", "b"]))
    found = []
    for wrong in (0.0, 0.01):
        served["b"] -= wrong
        for number in range(50):
            requests(number)
        found.append(requests.compare())
    (equal, compared), (fewer, again) = found
    assert equal == compared == again > 50 and 0 < fewer < again, "and those of the first load are forgotten"


OK, NO, NONE = "passed", "failed", "not applicable"


@pytest.mark.parametrize(("changes", "outcomes"), [
    ({}, [OK, OK, OK, OK]), ({"failed": 1, "errors": ["gone"]}, [NO, OK, OK, OK]), ({"equal": 9}, [OK, NO, OK, OK]),
    ({"ratio": 0.84}, [OK, OK, NO, OK]), ({"ratio": 0.84, "alone": 2.0}, [OK, OK, NONE, OK]),  # a small model
    ({"added": 2.6}, [OK, OK, OK, NO]), ({"ratio": 0.5, "added": 9.0, "given": True}, [OK, OK, NONE, NONE]),
])  # fmt: skip
def test_what_serving_may_cost(changes, outcomes):
    told = {"equal": 10, "failed": 0, "errors": [], "ratio": 0.9, "added": 2.0, "alone": 20.0} | changes
    load = {"per_second": 9.0, "answers": 9, "compared": 10, "milliseconds": {"p50": 20.0}, **told}
    ratio, added = (dict.fromkeys(("ratio", "p50", "low", "high"), told[key]) for key in ("ratio", "added"))
    closed = {**load, "concurrency": 8, "in_process": {"per_second": 10.0}, "throughput": ratio}
    figures = {"closed": [closed, {**closed, "concurrency": 1, "throughput": None}], "open": [],
               "in_process": {"milliseconds": {"in process": {"p50": told["alone"]}}, "added_ms": added}}  # fmt: skip
    assert [check.outcome for check in serving_checks(figures, given="given" in changes)] == outcomes


@pytest.mark.triton
def test_a_served_model_under_load(repository, texts):
    loads = {"batches": (1, 3), "concurrencies": (1, 2), "shares": (0.3,), "seconds": 0.6, "warmup_seconds": 0.1}
    figures, checks = measure_serving(Serving(repository=repository, items=texts, **loads, turns=2, rounds=5))
    assert [check.outcome for check in checks[:2]] == [OK, OK]
    assert [load["concurrency"] for load in figures["closed"]] == [1, 2]
    for load in figures["closed"]:
        assert load["milliseconds"]["p50"] > 0 and load["failed"] == 0
        assert load["equal"] == load["compared"] > load["answers"], "requests hold one text or three"
        assert load["in_process"]["answers"] > 0 and load["throughput"]["ratio"] > 0
        assert load["steps"].keys() == {"rekd", "rekd_selector", "rekd_predictor"}
        selector, predictor = (load["steps"][f"rekd_{role}"] for role in ("selector", "predictor"))
        assert selector["requests"] >= load["answers"] and selector["compute_ms"] > 0
        assert selector["request_ms"] + predictor["request_ms"] < load["milliseconds"]["max"]
    (opened,) = figures["open"]
    assert opened["equal"] == opened["compared"] >= opened["answers"]
    assert opened["rate"] == pytest.approx(0.3 * max(load["per_second"] for load in figures["closed"]))
    assert figures["in_process"]["ratio"]["ratio"] > 1, "a server in between costs something"


def test_what_cannot_be_sent_or_asked_is_refused(repository, tmp_path, run_cli):
    for load in (
        lambda: poisson_arrivals(0.0, 1.0, 0), lambda: poisson_arrivals(1.0, 0.0, 0),
        lambda: poisson_arrivals(float("nan"), 1.0, 0), lambda: closed_loop(print, concurrency=0, seconds=1.0),
        lambda: closed_loop(print, concurrency=1, seconds=0.0), lambda: Requests(["a"], (0,), list, [])):  # fmt: skip
        with pytest.raises(ConfigError):
            load()
    with pytest.raises(BenchmarkError, match="nothing to send"):
        measure_serving(Serving(repository=repository, items=[]))
    with pytest.raises(ServerUnavailableError, match="localhost:1"):
        read_totals("localhost:1", timeout=2.0)
    for options, said in ((["--file", tmp_path / "none.txt"], "none.txt"),
                          (["--file", "a.txt", "--data", "demo_student"], "two sources")):  # fmt: skip
        code, _, errors = run_cli(app, "serving", repository, *options)
        assert code == 1 and said in errors
