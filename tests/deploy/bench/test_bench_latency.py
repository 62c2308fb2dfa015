"""rekd-bench latency and serving: variants, rounds, loads, checks, what cannot run or is refused, and a real server."""

import json
import threading
import time
from functools import partial

import numpy as np
import pytest
from conftest import make_rationalizer, trained_tokenizer

from rekd_deploy.bench import variants
from rekd_deploy.bench.latency import AT_HAND, alike_check, check_lengths, classes_alike, full_batches, measure_latency
from rekd_deploy.bench.results import read_result
from rekd_deploy.bench.serving import Requests, Serving, measure_serving, read_totals, serving_checks
from rekd_deploy.bench.timing import Timings, closed_loop, in_rounds, open_loop, percentiles, poisson_arrivals
from rekd_deploy.bench.variants import CLASSIFIER, COMPACTED, COMPILED, ONNX_CPU, PYTORCH, ZEROED, Variant, comparisons
from rekd_deploy.bench.variants_graphs import traced
from rekd_deploy.cli.bench import app
from rekd_deploy.errors import BenchmarkError, DeadlineError, EngineError, RepositoryError, ServerUnavailableError
from rekd_train.checkpoints.checkpoint import save
from rekd_train.errors import ConfigError
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.text import TextPreprocessor, TextSettings

pytestmark = pytest.mark.slow

QUICK = {"batches": (2,), "lengths": (16,), "rounds": 3, "warmup_seconds": 0.0, "threads": 1}


def test_what_variants_there_are_what_each_is_compared_with_and_what_shares_a_trace(rationalizer, image_rationalizer):
    compacted = Variant(ONNX_CPU, COMPACTED, "int8", kept=8)
    others = [
        Variant(ONNX_CPU, ZEROED, "int8"), Variant(ONNX_CPU, CLASSIFIER, "int8", graphs=1), Variant(PYTORCH, ZEROED),
        Variant(ONNX_CPU, COMPACTED, "fp32", kept=8), Variant(ONNX_CPU, COMPACTED, "int8", kept=4),
        Variant(ONNX_CPU, CLASSIFIER, "fp32", graphs=1)]  # fmt: skip
    baselines = [other for variant, other in comparisons([compacted, *others]) if variant == compacted]
    assert set(baselines) == set(others[:4])
    one = Variant(ONNX_CPU, COMPACTED, "int8", graphs=1, kept=8)
    assert comparisons([compacted, one]) == [(one, compacted)] and one.name != compacted.name
    last = variants.networks_of(rationalizer, teacher=rationalizer)[-1]
    assert last.model == "classifier of the teacher's size" and last.variant(PYTORCH).graphs == 1
    assert rationalizer.predictor.operator == "compact", "the pair itself is as it was"
    with pytest.raises(BenchmarkError, match="another"):
        variants.networks_of(rationalizer, teacher=image_rationalizer)
    networks = [each for each in variants.networks_of(rationalizer) if each.model != COMPACTED]
    reports, not_run = [], []
    found = list(traced(networks, ["fp32"], [], gpu=False, not_run=not_run, report=lambda *at: reports.append(at)))
    assert [variant for variant, _ in found] == [Variant("", ZEROED), Variant("", CLASSIFIER, graphs=1)]
    assert found[0][1][1].model == found[1][1][0].model and reports == [(0, 1), (1, 1)] and not not_run


def test_compiled_and_eager_predict_alike_and_others_fail_the_check(rationalizer):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand more")
    classifier, batches = variants.networks_of(rationalizer)[2], full_batches(rationalizer.preprocessor, 2, 16)
    both = [COMPILED, PYTORCH]
    (compiled, eager), not_run = variants.pytorch_runnables(classifier, batches, "cpu", both, backend="eager")
    assert not not_run
    np.testing.assert_allclose(eager.run(1), compiled.run(1), atol=1e-5)
    assert not np.allclose(eager.run(0), eager.run(1)), "each round has its own batch"
    found, (failed,) = variants.pytorch_runnables(classifier, batches, "cpu", both, backend=broken)
    assert [each.variant.runtime for each in found] == [PYTORCH]
    assert failed.name == "torch.compile fp32, classifier" and "no compiler here" in failed.reason
    def one(runtime, classes, precision="fp32"):
        return variants.Runnable(Variant(runtime, COMPACTED, precision), lambda number: np.eye(3)[classes])
    alike = classes_alike([one("a", [0, 1, 2, 2]), one("b", [0, 1, 2, 1])], 2)
    other = one("c", [1, 1, 1, 1], "int8")
    assert classes_alike([one("a", [0, 1, 2, 2]), other], 2) == (0, 0), "other precisions may round otherwise"
    outcomes = [alike_check(counts).outcome for counts in ([alike], [(99, 100), (0, 0)], [(0, 0)])]
    assert alike == (6, 8) and outcomes == ["failed", "passed", "not applicable"]


@pytest.mark.parametrize(("operator", "roles"), [("compact", variants.BOTH), ("zero", variants.PREDICTOR)])
def test_pytorch_in_fp16_is_another_variant_that_predicts_alike(operator, roles):
    found = {}
    for precision in ("fp32", "fp16"):
        pair = make_rationalizer(operator=operator)
        each = variants.Networks(COMPACTED if roles == variants.BOTH else CLASSIFIER, pair, roles)
        batches = full_batches(pair.preprocessor, 2, 16)
        (one,), not_run = variants.pytorch_runnables(each, batches, "cpu", [PYTORCH], precision=precision)
        assert not_run == [] and one.variant.precision == precision
        found[precision] = one.run(0)
    np.testing.assert_allclose(found["fp16"], found["fp32"], rtol=0.02)
    assert not np.array_equal(found["fp16"], found["fp32"])


def test_texts_fill_the_lengths_that_are_served_and_batches_differ_from_round_to_round(
    rationalizer, image_rationalizer):
    for length in (16, 32, 48):
        batches = full_batches(rationalizer.preprocessor, 3, length)
        for batch in batches:
            assert batch["input_ids"].shape == (3, length) and batch["attention_mask"].mean() > 0.95
        assert len({batch["input_ids"].tobytes() for batch in batches}) == AT_HAND == len(batches)
    batches = full_batches(image_rationalizer.preprocessor, 2, 12)
    assert len({batch["pixels"].tobytes() for batch in batches}) == AT_HAND
    for each in variants.networks_of(image_rationalizer):
        (found,), not_run = variants.pytorch_runnables(each, batches, "cpu", [PYTORCH])
        assert found.run(0).shape == (2, 3) and not not_run
    for tokenizer, ends in (("start token alone", 0), ("byte-level BPE", 1)):
        preprocessor = TextPreprocessor(trained_tokenizer(tokenizer), TextSettings(max_length=16))
        for batch in full_batches(preprocessor, 2, 16):
            special = np.isin(batch["input_ids"], list(preprocessor.special_ids.values()))
            assert special.sum(axis=-1).tolist() == [1 + ends] * 2 and special[:, 0].all()
    assert check_lengths(rationalizer.preprocessor, ()) == [16, 32, 48]
    assert check_lengths(image_rationalizer.preprocessor, ()) == [12]
    with pytest.raises(BenchmarkError, match="17 is not served; lengths: 16, 32, 48"):
        check_lengths(rationalizer.preprocessor, (16, 17))
    with pytest.raises(BenchmarkError, match="images"):
        check_lengths(image_rationalizer.preprocessor, (12,))


def test_every_variant_has_times_and_ratios(repository, checkpoint, image_rationalizer, tmp_path):
    without = (f"{ONNX_CPU} fp32, zeroed", f"{ONNX_CPU} fp32, classifier", COMPILED)
    found, (check,) = measure_latency([repository], checkpoint, **QUICK, without=without)
    (cell,) = found["cells"]
    assert {(way["runtime"], way["model"], way["graphs"]) for way in cell["ways"]} == {
        (ONNX_CPU, COMPACTED, 2), (ONNX_CPU, COMPACTED, 1), (PYTORCH, COMPACTED, 2), (PYTORCH, ZEROED, 2),
        (PYTORCH, CLASSIFIER, 1)}  # fmt: skip
    for way in cell["ways"]:
        times = way["milliseconds"]
        assert 0 < times["low"] <= times["p50"] <= times["high"] and times["p50"] <= times["p99"]
        assert way["items_per_second"] > 0
    baselines = {ratio["baseline"] for ratio in cell["ratios"]}
    assert baselines >= {f"{PYTORCH} fp32, {ZEROED}", f"{PYTORCH} fp32, classifier"}
    assert (check.outcome, check.value, cell["rounds"]) == ("passed", 1.0, 3)
    with pytest.raises(BenchmarkError, match="other tensors or has other labels"):
        measure_latency([repository], save(image_rationalizer, tmp_path / "images"), **QUICK)


def test_the_command_writes_a_result_and_what_cannot_be_timed_is_refused(repository, tmp_path, run_cli):
    code, printed, _ = run_cli(app, "latency", repository, "--batches", "1", "--lengths", "16", "--rounds", "3",
                               "--warmup", "0", "--threads", "1", "-o", tmp_path / "latency.json")  # fmt: skip
    assert code == 0 and json.loads(printed.splitlines()[-1])["kind"] == "latency" and "compacted" in printed
    result = read_result(tmp_path / "latency.json")
    assert result.figures["cells"][0]["rounds"] == 15, "five times as many at batch 1"
    assert result.inputs["repository 1"].sha256
    code, _, errors = run_cli(app, "latency", repository, "--batches", "1,two")
    assert code == 2 and "1,two" in errors
    for changes, error, message in (
        ({"batches": (0,)}, BenchmarkError, "batches"), ({"teacher": "some"}, BenchmarkError, "--checkpoint"),
        ({"without": ("ONNX",)}, BenchmarkError, "nothing is left to time"), ({"device": "tpu"}, EngineError, "tpu"),
        ({"repositories": ()}, BenchmarkError, "nothing to time"),
        ({"repositories": ("none",)}, RepositoryError, "none")):  # fmt: skip
        with pytest.raises(error, match=message):
            measure_latency(**{"repositories": [repository], **QUICK, **changes})


def test_rounds_shift_their_order_warm_up_and_a_machine_that_slows_down_changes_no_ratio():
    order, now = [], 0.0
    def rounds(seconds: dict[str, float], **options) -> Timings:
        """A clock that only work moves, on a machine that grows slower."""
        def work(name: str, number: int) -> None:
            nonlocal now
            order.append((name, number))
            now += seconds[name] * (1 + number)
        order.clear()
        return in_rounds({name: partial(work, name) for name in seconds}, clock=lambda: now, **options)
    timings = rounds({"fast": 0.001, "slow": 0.004}, rounds=9)
    assert percentiles(timings.milliseconds["fast"])["p50"] == pytest.approx(5.0)
    assert timings.ratio("fast", "slow") == pytest.approx({"ratio": 0.25, "low": 0.25, "high": 0.25})
    noise = np.random.default_rng(0).lognormal(0.0, 0.3, size=41)
    found = Timings({"a": 2.0 * noise, "b": np.ones(41)}).ratio("a", "b")
    assert found["low"] < 2.0 < found["high"] and found["low"] <= found["ratio"] <= found["high"]
    rounds(dict.fromkeys("abc", 1.0), rounds=3)
    timed = order[3:]  # the first three warm up
    assert timed == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1), ("c", 2), ("a", 2), ("b", 2)]
    rounds({"a": 0.5}, rounds=3, warmup_seconds=2.0)
    assert len(order) == 4 + 3
    with pytest.raises(ConfigError, match="2 rounds"):
        rounds({"a": 0.5}, rounds=2)


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
