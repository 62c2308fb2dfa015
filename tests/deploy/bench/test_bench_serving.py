"""Loads: the closed and the open loop, the server's own account, perf_analyzer, and a real server."""

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from bench_results import bench

from rekd_deploy.bench.load import Recorded, RequestMix, closed_loop, merged, open_loop, poisson_arrivals
from rekd_deploy.bench.serving import Serving, measure_serving, serving_checks
from rekd_deploy.bench.serving import _open as open_loads
from rekd_deploy.bench.triton import read_report, run_perf_analyzer, steps_between
from rekd_deploy.errors import BenchmarkError, DeadlineError, ServerUnavailableError
from rekd_deploy.server.status import StepTotals
from rekd_train.errors import ConfigError, MissingExtraError
from rekd_train.inputs.prediction import Prediction

STALL = 0.4


class OneAtATime:
    """Answers at once, but for one request that holds up everybody for a while."""

    def __init__(self, stalled: int) -> None:
        self._stalled, self._lock = stalled, threading.Lock()
        self.numbers: list[int] = []

    def __call__(self, number: int) -> None:
        with self._lock:
            self.numbers.append(number)
            if len(self.numbers) == self._stalled:
                time.sleep(STALL)


# loops


def test_a_stall_is_paid_by_all_who_come_meanwhile():
    """The closed loop sees a stall once: nobody asks while it waits. The open loop must not."""
    arrivals = np.arange(0.0, 0.8, 0.01)
    opened = open_loop(OneAtATime(stalled=10), arrivals)
    closed = closed_loop(OneAtATime(stalled=10), concurrency=1, seconds=0.8)
    slow = STALL * 1000 / 4
    assert (np.array(opened.milliseconds) > slow).sum() >= 20
    assert (np.array(closed.milliseconds) > slow).sum() <= 3
    assert len(opened.milliseconds) == len(arrivals)


def test_waiting_for_a_free_client_counts():
    """With one client the second request is sent late, and its latency says so."""
    load = open_loop(lambda number: time.sleep(0.1), np.zeros(3), in_flight=1)
    waits = np.sort(load.milliseconds)
    assert waits[0] >= 100 and waits[1] >= 200 and waits[2] >= 300
    assert np.max(load.late_ms) >= 200


def test_each_client_has_one_request_in_flight():
    in_flight, most, lock = 0, 0, threading.Lock()

    def send(number: int) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.02)
        with lock:
            in_flight -= 1

    load = closed_loop(send, concurrency=3, seconds=0.3)
    assert most == 3
    assert min(load.milliseconds) >= 20
    assert load.per_second == pytest.approx(load.answered / load.seconds)


def test_throughput_is_what_was_answered_within_the_time():
    now = 0.0

    def send(number: int) -> None:
        nonlocal now
        now += 0.4

    load = closed_loop(send, concurrency=1, seconds=2.0, warmup_seconds=0.5, clock=lambda: now)
    assert (load.answered, load.seconds) == (5, 2.0), "one of the warm-up's came within it, the last one after it"
    assert load.per_second == pytest.approx(1 / 0.4), "however short the time"


def test_a_failure_is_no_throughput():
    now = 0.0

    def send(number: int) -> None:
        nonlocal now
        now += 0.5
        if now > 1.5:
            raise DeadlineError("no answer in time")

    load = closed_loop(send, concurrency=1, seconds=2.0, clock=lambda: now)
    assert (load.answered, load.failed) == (2, 2)


def test_the_warm_up_is_not_counted():
    begun = time.perf_counter()
    first: list[float] = []

    def send(number: int) -> None:
        first.append(time.perf_counter() - begun)
        time.sleep(0.01)

    load = closed_loop(send, concurrency=1, seconds=0.2, warmup_seconds=0.3)
    assert len(load.milliseconds) < len(first) and load.answered < len(first) and load.seconds == 0.2


def test_failures_are_counted_and_have_no_latency():
    def send(number: int) -> None:
        if number % 2:
            raise DeadlineError("no answer in time")

    load = open_loop(send, np.linspace(0, 0.05, 10))
    assert load.failed == 5 and len(load.milliseconds) == 5 and load.errors == {"no answer in time"}
    assert load.answered == 5
    figures = load.figures()
    assert figures["failed"] == 5 and figures["answers"] == 5 and figures["milliseconds"]["p50"] >= 0


def test_a_first_request_that_fails_ends_the_load():
    def send(number: int) -> None:
        raise ServerUnavailableError("nobody there")

    with pytest.raises(ServerUnavailableError):
        closed_loop(send, concurrency=1, seconds=0.1)
    with pytest.raises(ServerUnavailableError):
        open_loop(send, np.zeros(1))


def test_arrivals_are_poissons():
    arrivals = poisson_arrivals(rate=200.0, seconds=50.0, seed=0)
    gaps = np.diff(arrivals)
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05), "exponential gaps: as much spread as mean"
    assert (poisson_arrivals(200.0, 50.0, 0) == arrivals).all() and len(poisson_arrivals(200.0, 50.0, 1)) != 0


@pytest.mark.parametrize(("rate", "seconds"), [(0.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_no_rate_or_no_time_is_refused(rate, seconds):
    with pytest.raises(ConfigError):
        poisson_arrivals(rate, seconds, 0)


def test_loads_of_one_kind_are_added_up():
    loads = [closed_loop(lambda number: time.sleep(0.01), concurrency=2, seconds=0.1) for _ in range(2)]
    both = merged(loads)
    assert len(both.milliseconds) == sum(len(load.milliseconds) for load in loads)
    assert both.seconds == sum(load.seconds for load in loads)
    assert both.per_second == pytest.approx(np.mean([load.per_second for load in loads]), rel=0.3)


# requests and their answers


def answer(text, probability=0.9):
    return Prediction("good", {"good": probability}, [], rate=0.1, truncated=False, text=text)


def test_requests_mix_sizes_and_items_and_are_the_same_for_all():
    mix, again = RequestMix(list("abcdefg"), (1, 4), seed=1), RequestMix(list("abcdefg"), (1, 4), seed=1)
    requests = [mix(number) for number in range(200)]
    assert requests == [again(number) for number in range(200)]
    assert {len(request) for request in requests} == {1, 4}
    counts = np.bincount([mix.items.index(item) for request in requests for item in request])
    assert counts.min() > 0.9 * counts.max(), "every item in its turn"
    with pytest.raises(ConfigError, match="from 1"):
        RequestMix(["a"], (0,))


def test_a_wrong_answer_under_load_is_seen():
    mix = RequestMix(["a", "b"], (1, 2))
    expected = [answer("a", 0.9), answer("b", 0.8)]
    wrong = threading.Event()

    def predict(items):
        shift = 0.01 if wrong.is_set() and "b" in items else 0.0
        return [answer(item, {"a": 0.9, "b": 0.8}[item] - shift) for item in items]

    recorded = Recorded(mix, predict, expected, None)
    for number in range(50):
        recorded(number)
    equal, compared = recorded.compare()
    assert equal == compared > 50
    wrong.set()
    for number in range(50):
        recorded(number)
    equal, compared = recorded.compare()
    assert 0 < equal < compared, "and those of the first load are forgotten"


def judged(equal=10, ratio=0.9, added=2.0, alone=20.0, given=False):
    load = {
        "concurrency": 8, "per_second": 9.0, "answers": 9, "failed": 0, "errors": [], "equal": equal, "compared": 10,
        "in_process": {"per_second": 10.0}, "throughput": {"ratio": ratio, "low": ratio, "high": ratio},
    }  # fmt: skip
    figures = {"closed": [load, {**load, "concurrency": 1, "throughput": None}], "open": [],
               "in_process": {"milliseconds": {"in process": {"p50": alone}},
                              "added_ms": {"p50": added, "low": added, "high": added}}}  # fmt: skip
    return [check.outcome for check in serving_checks(figures, given=given)]


def test_what_serving_may_cost():
    ok, no, none = "passed", "failed", "not applicable"
    assert judged() == [ok, ok, ok, ok, none]
    assert judged(equal=9) == [ok, no, ok, ok, none]
    assert judged(ratio=0.84) == [ok, ok, no, ok, none]
    assert judged(ratio=0.84, alone=2.0) == [ok, ok, none, ok, none], "a small model"
    assert judged(added=2.6) == [ok, ok, ok, no, none]
    assert judged(ratio=0.5, added=9.0, given=True) == [ok, ok, none, none, none]


def test_shares_of_no_throughput_are_no_loads():
    serving = SimpleNamespace(rates=(), shares=(0.5, 0.8))
    assert open_loads(serving, None, 0.0, lambda what, done, total: None) == []


# the server's account


def entry(name, count, queue, compute, rows, executions):
    parts = {key: {"count": count, "ns": ns} for key, ns in {
        "success": queue + compute, "queue": queue, "compute_input": 0, "compute_infer": compute, "compute_output": 0,
    }.items()}  # fmt: skip
    return {"name": name, "inference_stats": parts, "inference_count": str(rows), "execution_count": str(executions)}


def test_the_steps_of_a_load_are_the_difference_of_two_readings():
    before = {"rekd_selector": StepTotals.of(entry("rekd_selector", 10, 10_000_000, 40_000_000, 10, 10))}
    after = {
        "rekd_selector": StepTotals.of(entry("rekd_selector", 14, 18_000_000, 60_000_000, 22, 13)),
        "rekd_single": StepTotals.of({"name": "rekd_single"}),
    }
    assert steps_between(before, after) == {"rekd_selector": {
        "requests": 4, "rows_per_batch": 4.0, "queue_ms": 2.0, "input_ms": 0.0, "compute_ms": 5.0, "output_ms": 0.0,
        "request_ms": 7.0,
    }}  # fmt: skip


# perf_analyzer


def test_its_report_is_read_in_milliseconds():
    text = (
        "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
        "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
        "2,437.397,3,1310,1000,32,802,128,2,1344,3894,8977,15991\n"
    )
    assert read_report(text) == {
        "concurrency": 2.0, "per_second": 437.397, "p50": 1.344, "p90": 3.894, "p95": 8.977, "p99": 15.991,
        "queue_ms": 1.0, "input_ms": 0.032, "compute_ms": 0.802, "output_ms": 0.128,
    }  # fmt: skip
    with pytest.raises(BenchmarkError, match="no figures"):
        read_report("Concurrency,Inferences/Second\n")


def test_without_it_the_extra_is_named(monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(MissingExtraError, match="perf"):
        run_perf_analyzer("localhost:1", "rekd", [], [1], request_count=1, timeout=1.0)


# a real server


@pytest.mark.triton
def test_a_served_model_under_load(repository, texts):
    serving = Serving(
        repository=repository, items=texts, batches=(1, 3), concurrencies=(1, 2), shares=(0.3,), seconds=0.6, turns=2,
        warmup_seconds=0.1, rounds=5, perf_analyzer=False,
    )  # fmt: skip
    figures, checks = measure_serving(serving)
    assert [check.outcome for check in checks[:2]] == ["passed", "passed"]
    assert [load["concurrency"] for load in figures["closed"]] == [1, 2]
    for load in figures["closed"]:
        assert load["milliseconds"]["p50"] > 0 and load["failed"] == 0
        assert load["equal"] == load["compared"] > load["answers"], "requests send about one or three"
        assert load["in_process"]["answers"] > 0 and load["throughput"]["ratio"] > 0
        steps = load["steps"]
        assert {"rekd", "rekd_selector", "rekd_predictor"} <= set(steps)
        assert steps["rekd_selector"]["requests"] >= load["answers"]
        assert steps["rekd_selector"]["compute_ms"] > 0
        inside = steps["rekd_selector"]["request_ms"] + steps["rekd_predictor"]["request_ms"]
        assert inside < load["milliseconds"]["max"]
    (opened,) = figures["open"]
    assert opened["equal"] == opened["compared"] >= opened["answers"]
    assert opened["rate"] == pytest.approx(0.3 * max(load["per_second"] for load in figures["closed"]))
    assert figures["perf_analyzer_not_run"] == "it was not asked for"
    assert figures["in_process"]["ratio"]["ratio"] > 1, "a server in between costs something"


def test_perf_analyzer_agrees_about_the_server(repository, texts):
    # without the marker 'triton', whose tests may not skip in CI: the wheel is only for glibc 2.38 and later
    pytest.importorskip("perf_analyzer")
    pytest.importorskip("pytriton", exc_type=ImportError)
    from rekd_deploy.client.pipeline import Pipeline
    from rekd_deploy.server.server import TritonServer

    preprocessor = Pipeline(repository).preprocessor
    requests = [dict(preprocessor([text]).inputs) for text in texts[:2]]
    with TritonServer(repository, grpc_port=0, http_port=0, metrics_port=0) as server:
        (found,) = run_perf_analyzer(
            server.grpc_url, "rekd", requests[:1], [2], request_count=20, timeout=60.0
        )
    assert found["concurrency"] == 2 and 0 < found["p50"] <= found["p99"] and found["compute_ms"] > 0


def test_nothing_to_send_is_refused(repository):
    with pytest.raises(BenchmarkError, match="nothing to send"):
        measure_serving(Serving(repository=repository, items=[]))


def test_the_command_refuses_texts_for_images_before_it_serves(repository, tmp_path, capsys):
    assert bench("serving", repository, "--file", tmp_path / "none.txt") == 1
    assert "none.txt" in capsys.readouterr().err


def test_its_table_shows_every_load(capsys):
    from rekd_deploy.cli.bench_timing import serving_rows as rows

    times = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    load = {"milliseconds": times, "per_second": 5.0, "failed": 0}
    steps = {"rekd_selector": {"queue_ms": 0.5, "compute_ms": 2.0}, "rekd": {"queue_ms": 0.0, "compute_ms": 2.5}}
    closed = {"concurrency": 1, "steps": steps, "in_process": load, "throughput": {"ratio": 0.9}, **load}
    figures = {
        "closed": [closed], "open": [{"rate": 4.0, **load}],
        "perf_analyzer": [{"concurrency": 1.0, "per_second": 6.0, **times}], "perf_analyzer_not_run": None,
        "in_process": {"milliseconds": {"served": times, "in process": times},
                       "ratio": {"ratio": 1.5, "low": 1.4, "high": 1.6},
                       "added_ms": {"p50": 0.5, "low": 0.4, "high": 0.6}},
    }  # fmt: skip
    lines = rows(json.loads(json.dumps(figures)))
    assert len(lines) == 8 and all(len(line) == 7 for line in lines)
    assert lines[0][-1] == "selector: 0.50 queue + 2.00 compute"
