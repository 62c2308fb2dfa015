"""rekd-bench latency: variants and what they are compared with, rounds, steps, what cannot run, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from bench_results import bench
from conftest import make_rationalizer

from rekd_deploy.bench.latency import AT_HAND, Grid, Subjects, check_lengths, full_batches, measure_latency
from rekd_deploy.bench.results import read_result
from rekd_deploy.bench.variants import (
    CLASSIFIER,
    COMPACTED,
    ONNX_CPU,
    PYTORCH,
    ZEROED,
    Runnable,
    Stopwatch,
    Timings,
    Variant,
    alike_check,
    classes_alike,
    comparisons,
    in_rounds,
    percentiles,
)
from rekd_deploy.bench.variants_graphs import traced
from rekd_deploy.bench.variants_torch import BOTH, PREDICTOR, Networks, networks_of, pytorch_runnables
from rekd_deploy.errors import BenchmarkError, EngineError, RepositoryError
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.runtimes.base import RunnerChain
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_train.errors import ConfigError

QUICK = {"batches": (2,), "lengths": (16,), "rounds": 3, "warmup_seconds": 0.0, "threads": 1}
NO_TRACES = (f"{ONNX_CPU} fp32, zeroed", f"{ONNX_CPU} fp32, classifier")


@pytest.fixture(scope="module")
def figures(repository, checkpoint):
    """One cell of the repository's graphs and the checkpoint's networks in PyTorch."""
    grid = Grid(**QUICK, without=(*NO_TRACES, "torch.compile"))
    return measure_latency(Subjects([repository], checkpoint), grid)


def by_name(cell):
    return {way["name"]: way for way in cell["ways"]}


# variants


def test_a_variant_is_compared_with_what_differs_in_one_thing():
    compacted = Variant(ONNX_CPU, COMPACTED, "int8", kept=8)
    others = [
        Variant(ONNX_CPU, ZEROED, "int8"), Variant(ONNX_CPU, CLASSIFIER, "int8", graphs=1), Variant(PYTORCH, ZEROED),
        Variant(ONNX_CPU, COMPACTED, "fp32", kept=8), Variant(ONNX_CPU, COMPACTED, "int8", kept=4),
        Variant(ONNX_CPU, CLASSIFIER, "fp32", graphs=1),
    ]  # fmt: skip
    baselines = [other for variant, other in comparisons([compacted, *others]) if variant == compacted]
    assert set(baselines) == set(others[:4])


def test_one_graph_is_compared_with_two():
    two, one = Variant(ONNX_CPU, COMPACTED, kept=8), Variant(ONNX_CPU, COMPACTED, graphs=1, kept=8)
    assert (one, two) in comparisons([two, one]) and (two, one) not in comparisons([two, one])
    assert one.name != two.name


def test_a_variant_remembers_the_steps_of_its_last_calls():
    watch = Stopwatch(iter([0.0, 1.0, 3.0]).__next__)
    watch.lap("selector")
    watch.lap("predictor")
    assert watch.steps == {"selector": 1000.0, "predictor": 2000.0}
    way = Runnable(
        Variant(ONNX_CPU, COMPACTED), lambda number, watch: watch.steps.update(selector=float(number)) or np.zeros(1)
    )
    for number in range(5):
        way(number)
    assert way.last(2)["selector"].tolist() == [3.0, 4.0]


# inputs


@pytest.mark.parametrize("length", [16, 32, 48])
def test_texts_fill_their_length(rationalizer, length):
    batches = full_batches(rationalizer.preprocessor, 3, length)
    assert len(batches.encoded) == AT_HAND
    for encoded in batches.encoded:
        assert encoded.inputs["input_ids"].shape == (3, length)
        assert encoded.inputs["attention_mask"].mean() > 0.95
    ids = [encoded.inputs["input_ids"].tobytes() for encoded in batches.encoded]
    assert len(set(ids)) == AT_HAND


def test_images_differ_from_round_to_round(image_rationalizer):
    batches = full_batches(image_rationalizer.preprocessor, 2, 12)
    assert len({encoded.inputs["pixels"].tobytes() for encoded in batches.encoded}) == AT_HAND
    assert check_lengths(image_rationalizer.preprocessor, ()) == [12]
    with pytest.raises(BenchmarkError, match="images"):
        check_lengths(image_rationalizer.preprocessor, (12,))


def test_a_length_that_would_be_padded_is_refused(rationalizer):
    with pytest.raises(BenchmarkError, match="17 is not served; lengths: 16, 32, 48"):
        check_lengths(rationalizer.preprocessor, (16, 17))


# what is measured


def test_every_variant_has_times_steps_and_ratios(figures):
    found, checks = figures
    (cell,) = found["cells"]
    ways = by_name(cell)
    assert {(way["runtime"], way["model"], way["graphs"]) for way in ways.values()} == {
        (ONNX_CPU, COMPACTED, 2), (ONNX_CPU, COMPACTED, 1), (PYTORCH, COMPACTED, 2), (PYTORCH, ZEROED, 2),
        (PYTORCH, CLASSIFIER, 1),
    }  # fmt: skip
    for way in ways.values():
        times = way["milliseconds"]
        assert 0 < times["low"] <= times["p50"] <= times["high"] and times["p50"] <= times["p99"]
        assert way["items_per_second"] > 0
        steps = {1: {"single"} if way["model"] == COMPACTED else {"predictor"}, 2: {"selector", "predictor"}}
        assert set(way["steps"]) == steps[way["graphs"]]
        assert way["device_steps"] == {}
    baselines = {ratio["baseline"] for ratio in cell["ratios"]}
    assert baselines >= {f"{PYTORCH} fp32, {ZEROED}", f"{PYTORCH} fp32, classifier"}
    assert set(cell["around"]) == {"preprocess", "decode"}
    assert checks[0].outcome == "passed" and checks[0].value == 1.0
    assert set(found["machine"]) == {"before", "after"}


def test_the_steps_are_parts_of_the_whole(figures):
    for way in figures[0]["cells"][0]["ways"]:
        assert max(step["p50"] for step in way["steps"].values()) <= way["milliseconds"]["p99"]


def test_other_k_are_other_variants(rationalizer):
    networks = networks_of(rationalizer, budgets=(0.1, 0.25, 0.5))
    kept = [each.variant(PYTORCH).kept for each in networks if each.model == COMPACTED]
    assert kept == [rationalizer.capacity, 4, 23]  # 0.25 is the pair's own, so it is there once
    assert rationalizer.predictor.operator == "compact", "the pair itself is as it was"
    with pytest.raises(BenchmarkError, match="budget 1.5"):
        networks_of(rationalizer, budgets=(1.5,))


def test_a_teacher_gives_a_larger_classifier(rationalizer):
    networks = networks_of(rationalizer, teacher=rationalizer)
    assert networks[-1].model == "classifier of the teacher's size" and networks[-1].variant(PYTORCH).graphs == 1


def test_a_teacher_with_other_tensors_is_refused(rationalizer, image_rationalizer):
    with pytest.raises(BenchmarkError, match="another"):
        networks_of(rationalizer, teacher=image_rationalizer)


def test_a_zeroed_pair_and_a_classifier_share_one_trace(rationalizer):
    networks = [each for each in networks_of(rationalizer) if each.model != COMPACTED]
    reports, not_run = [], []
    found = list(traced(networks, ["fp32"], [], gpu=False, not_run=not_run, report=lambda *at: reports.append(at)))
    assert [(each.model, precision) for each, _, precision in found] == [(ZEROED, "fp32"), (CLASSIFIER, "fp32")]
    assert found[0][1] is found[1][1] and reports == [(0, 1), (1, 1)] and not not_run


def test_a_compiler_that_fails_is_said_and_costs_no_other_variant(rationalizer):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand more")

    each = networks_of(rationalizer)[2]
    arrays = [dict(encoded.inputs) for encoded in full_batches(rationalizer.preprocessor, 1, 16).encoded]
    ways, not_run = pytorch_runnables(each, arrays, "cpu", ["torch.compile", PYTORCH], backend=broken)
    assert [way.variant.runtime for way in ways] == [PYTORCH]
    assert not_run[0].name == "torch.compile fp32, classifier" and "no compiler here" in not_run[0].reason


def test_compiled_and_eager_answer_alike(rationalizer):
    each = networks_of(rationalizer)[2]
    arrays = [dict(encoded.inputs) for encoded in full_batches(rationalizer.preprocessor, 2, 16).encoded]
    ways, not_run = pytorch_runnables(each, arrays, "cpu", [PYTORCH, "torch.compile"], backend="eager")
    assert not not_run
    np.testing.assert_allclose(ways[0](1), ways[1](1), atol=1e-5)
    assert not np.allclose(ways[0](0), ways[0](1)), "each round has its own batch"


def test_images_are_timed_alike(image_rationalizer):
    arrays = [dict(encoded.inputs) for encoded in full_batches(image_rationalizer.preprocessor, 2, 12).encoded]
    for each in networks_of(image_rationalizer):
        ways, not_run = pytorch_runnables(each, arrays, "cpu", [PYTORCH])
        assert ways[0](0).shape == (2, 3) and not not_run


def test_variants_that_predict_otherwise_fail_the_check():
    def way(runtime, classes):
        logits = np.eye(3)[classes]
        return Runnable(Variant(runtime, COMPACTED), lambda number, watch: logits)

    alike = classes_alike([way("a", [0, 1, 2, 2]), way("b", [0, 1, 2, 1])], 2)
    assert alike == (6, 8)
    assert alike_check([alike]).outcome == "failed"
    assert alike_check([(0, 0)]).outcome == "not applicable"
    other = Runnable(Variant("c", COMPACTED, "int8"), lambda number, watch: np.eye(3)[[1, 1, 1, 1]])
    assert classes_alike([way("a", [0, 1, 2, 2]), other], 2) == (0, 0), "other precisions may round otherwise"


# refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (0,)}, "batches"),
        ({"budgets": (0.1,)}, "--checkpoint"),
        ({"without": ("ONNX",)}, "nothing is left to time"),
    ],
)
def test_what_cannot_be_timed_is_refused(repository, changes, message):
    with pytest.raises(BenchmarkError, match=message):
        measure_latency(Subjects([repository]), Grid(**{**QUICK, **changes}))


def test_nothing_to_time_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match="nothing to time"):
        measure_latency(Subjects(), Grid())
    with pytest.raises(RepositoryError):
        measure_latency(Subjects([tmp_path / "none"]), Grid())


def test_an_unknown_device_is_refused(repository):
    with pytest.raises(EngineError, match="tpu"):
        measure_latency(Subjects([repository]), dataclasses.replace(Grid(), device="tpu"))


# the command


def test_the_command_writes_a_result_and_ends_with_json(repository, tmp_path, capsys):
    output = tmp_path / "latency.json"
    arguments = ["latency", repository, "--batches", "1", "--lengths", "16", "--rounds", "3", "--warmup", "0",
                 "--threads", "1", "-o", output]  # fmt: skip
    assert bench(*arguments) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["kind"] == "latency"
    result = read_result(output)
    assert result.figures["cells"][0]["rounds"] == 15, "five times as many at batch 1"
    assert result.inputs["repository 1"].sha256


def test_a_list_that_is_none_is_a_usage_error(repository, capsys):
    assert bench("latency", repository, "--batches", "1,two") == 2 and "1,two" in capsys.readouterr().err


@pytest.mark.parametrize("operator", ["compact", "zero"])
def test_pytorch_in_fp16_is_another_variant_that_predicts_alike(operator):
    batches = [dict(full_batches(make_rationalizer().preprocessor, 2, 16).encoded[0].inputs)]
    roles, model = (BOTH, COMPACTED) if operator == "compact" else (PREDICTOR, CLASSIFIER)
    found = {}
    for precision in ("fp32", "fp16"):
        each = Networks(model, make_rationalizer(operator=operator), roles)
        (way,), not_run = pytorch_runnables(each, batches, "cpu", [PYTORCH], precision=precision)
        assert not_run == [] and way.variant.precision == precision
        found[precision] = way(0)
    np.testing.assert_allclose(found["fp16"], found["fp32"], rtol=0.02)
    assert not np.array_equal(found["fp16"], found["fp32"])


# rounds: a drifting machine changes no ratio


class Machine:
    """A clock that only work moves, on a machine that grows slower."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[tuple[str, int]] = []

    def variant(self, name: str, seconds: float):
        def work(number: int) -> None:
            self.order.append((name, number))
            self.now += seconds * (1 + number)

        return work


def test_a_machine_that_slows_down_changes_no_ratio():
    machine = Machine()
    variants = {"fast": machine.variant("fast", 0.001), "slow": machine.variant("slow", 0.004)}
    timings = in_rounds(variants, rounds=9, clock=lambda: machine.now)
    assert percentiles(timings.milliseconds["fast"])["p50"] == pytest.approx(5.0)
    found = timings.ratio("fast", "slow")
    assert found == pytest.approx({"ratio": 0.25, "low": 0.25, "high": 0.25})


def test_the_order_shifts_and_every_variant_runs_once_a_round():
    machine = Machine()
    in_rounds({name: machine.variant(name, 1.0) for name in "abc"}, rounds=3, clock=lambda: machine.now)
    timed = machine.order[3:]  # the first three warm up
    assert timed == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1), ("c", 2), ("a", 2), ("b", 2)]


def test_each_variant_warms_up_for_its_time():
    machine = Machine()
    in_rounds({"a": machine.variant("a", 0.5)}, rounds=3, warmup_seconds=2.0, clock=lambda: machine.now)
    assert len(machine.order) == 4 + 3


def test_the_interval_holds_the_spread_of_the_rounds():
    generator = np.random.default_rng(0)
    noise = generator.lognormal(0.0, 0.3, size=41)
    found = Timings({"a": 2.0 * noise, "b": np.ones(41)}).ratio("a", "b")
    assert found["low"] < 2.0 < found["high"] and found["low"] <= found["ratio"] <= found["high"]


def test_two_rounds_are_refused():
    with pytest.raises(ConfigError, match="2 rounds"):
        in_rounds({"a": lambda number: None}, rounds=2)


def test_graphs_and_pytorch_predict_alike(rationalizer, artefacts, texts):
    inputs = dict(rationalizer.preprocessor(texts[:3]).inputs)
    signature = pair_signature(rationalizer)
    (eager,), _ = pytorch_runnables(Networks(COMPACTED, rationalizer.eval(), BOTH), [inputs], "cpu", [PYTORCH])
    selector = OnnxRuntimeRunner(artefacts.selector, signature.selector, "selector")
    predictor = OnnxRuntimeRunner(artefacts.predictor, signature.predictor, "predictor")
    with RunnerChain([selector, predictor]) as chain:
        found = chain.run(inputs)
    np.testing.assert_allclose(found["logits"], eager(0), atol=1e-5)
