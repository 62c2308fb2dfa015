"""rekd-bench latency: forms and what they are held against, steps, what cannot run, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
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
    Variant,
    alike_check,
    classes_alike,
    comparisons,
)
from rekd_deploy.bench.variants_graphs import traced
from rekd_deploy.bench.variants_torch import BOTH, PREDICTOR, Networks, networks_of, pytorch_runnables
from rekd_deploy.errors import BenchmarkError, EngineError, RepositoryError

QUICK = {"batches": (2,), "lengths": (16,), "rounds": 3, "warmup_seconds": 0.0, "threads": 1}
NO_TRACES = (f"{ONNX_CPU} fp32, zeroed", f"{ONNX_CPU} fp32, classifier")


@pytest.fixture(scope="module")
def figures(repository, checkpoint):
    """One cell of the repository's graphs and the checkpoint's networks in PyTorch."""
    grid = Grid(**QUICK, without=(*NO_TRACES, "torch.compile"))
    return measure_latency(Subjects([repository], checkpoint), grid)


def by_name(cell):
    return {way["name"]: way for way in cell["ways"]}


# forms


def test_a_form_is_held_against_what_differs_in_one_thing():
    compacted = Variant(ONNX_CPU, COMPACTED, "int8", kept=8)
    others = [
        Variant(ONNX_CPU, ZEROED, "int8"), Variant(ONNX_CPU, CLASSIFIER, "int8", graphs=1), Variant(PYTORCH, ZEROED),
        Variant(ONNX_CPU, COMPACTED, "fp32", kept=8), Variant(ONNX_CPU, COMPACTED, "int8", kept=4),
        Variant(ONNX_CPU, CLASSIFIER, "fp32", graphs=1),
    ]  # fmt: skip
    against = [other for form, other in comparisons([compacted, *others]) if form == compacted]
    assert set(against) == set(others[:4])


def test_one_graph_is_held_against_two():
    two, one = Variant(ONNX_CPU, COMPACTED, kept=8), Variant(ONNX_CPU, COMPACTED, graphs=1, kept=8)
    assert (one, two) in comparisons([two, one]) and (two, one) not in comparisons([two, one])
    assert one.name != two.name


def test_a_way_remembers_the_steps_of_its_last_calls():
    seconds = iter([0.0, 1.0, 3.0, 10.0, 14.0, 15.0])
    watches = [Stopwatch(lambda: next(seconds)) for _ in range(1)]
    watches[0].lap("selector")
    watches[0].lap("predictor")
    assert watches[0].steps == {"selector": 1000.0, "predictor": 2000.0}
    way = Runnable(
        Variant(ONNX_CPU, COMPACTED), lambda turn, watch: watch.steps.update(selector=float(turn)) or np.zeros(1)
    )
    for turn in range(5):
        way(turn)
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


def test_images_differ_from_turn_to_turn(image_rationalizer):
    batches = full_batches(image_rationalizer.preprocessor, 2, 12)
    assert len({encoded.inputs["pixels"].tobytes() for encoded in batches.encoded}) == AT_HAND
    assert check_lengths(image_rationalizer.preprocessor, ()) == [12]
    with pytest.raises(BenchmarkError, match="images"):
        check_lengths(image_rationalizer.preprocessor, (12,))


def test_a_length_that_would_be_padded_is_refused(rationalizer):
    with pytest.raises(BenchmarkError, match="17 is not served; lengths: 16, 32, 48"):
        check_lengths(rationalizer.preprocessor, (16, 17))


# what is measured


def test_every_form_has_times_steps_and_ratios(figures):
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


def test_other_k_are_other_forms(rationalizer):
    lines = networks_of(rationalizer, budgets=(0.1, 0.25, 0.5))
    kept = [line.variant(PYTORCH).kept for line in lines if line.model == COMPACTED]
    assert kept == [rationalizer.capacity, 4, 23]  # 0.25 is the pair's own, so it is there once
    assert rationalizer.predictor.operator == "compact", "the pair itself is as it was"
    with pytest.raises(BenchmarkError, match="budget 1.5"):
        networks_of(rationalizer, budgets=(1.5,))


def test_a_teacher_gives_a_larger_classifier(rationalizer):
    lines = networks_of(rationalizer, teacher=rationalizer)
    assert lines[-1].model == "classifier of the teacher's size" and lines[-1].variant(PYTORCH).graphs == 1


def test_a_teacher_with_other_tensors_is_refused(rationalizer, image_rationalizer):
    with pytest.raises(BenchmarkError, match="another"):
        networks_of(rationalizer, teacher=image_rationalizer)


def test_a_zeroed_pair_and_a_classifier_share_one_trace(rationalizer):
    lines = [line for line in networks_of(rationalizer) if line.model != COMPACTED]
    reports, not_run = [], []
    found = list(traced(lines, ["fp32"], [], gpu=False, not_run=not_run, report=lambda *at: reports.append(at)))
    assert [(line.model, precision) for line, _, precision in found] == [(ZEROED, "fp32"), (CLASSIFIER, "fp32")]
    assert found[0][1] is found[1][1] and reports == [(0, 1), (1, 1)] and not not_run


def test_a_compiler_that_fails_is_said_and_costs_no_other_way(rationalizer):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand more")

    line = networks_of(rationalizer)[2]
    arrays = [dict(encoded.inputs) for encoded in full_batches(rationalizer.preprocessor, 1, 16).encoded]
    ways, not_run = pytorch_runnables(line, arrays, "cpu", ["torch.compile", PYTORCH], backend=broken)
    assert [way.variant.runtime for way in ways] == [PYTORCH]
    assert not_run[0].name == "torch.compile fp32, classifier" and "no compiler here" in not_run[0].reason


def test_compiled_and_eager_answer_alike(rationalizer):
    line = networks_of(rationalizer)[2]
    arrays = [dict(encoded.inputs) for encoded in full_batches(rationalizer.preprocessor, 2, 16).encoded]
    ways, not_run = pytorch_runnables(line, arrays, "cpu", [PYTORCH, "torch.compile"], backend="eager")
    assert not not_run
    np.testing.assert_allclose(ways[0](1), ways[1](1), atol=1e-5)
    assert not np.allclose(ways[0](0), ways[0](1)), "each turn has its own batch"


def test_images_are_timed_alike(image_rationalizer):
    arrays = [dict(encoded.inputs) for encoded in full_batches(image_rationalizer.preprocessor, 2, 12).encoded]
    for line in networks_of(image_rationalizer):
        ways, not_run = pytorch_runnables(line, arrays, "cpu", [PYTORCH])
        assert ways[0](0).shape == (2, 3) and not not_run


def test_forms_that_answer_otherwise_fail_the_check():
    def way(runtime, classes):
        logits = np.eye(3)[classes]
        return Runnable(Variant(runtime, COMPACTED), lambda turn, watch: logits)

    alike = classes_alike([way("a", [0, 1, 2, 2]), way("b", [0, 1, 2, 1])], 2)
    assert alike == (6, 8)
    assert alike_check([alike]).outcome == "failed"
    assert alike_check([(0, 0)]).outcome == "not applicable"
    other = Runnable(Variant("c", COMPACTED, "int8"), lambda turn, watch: np.eye(3)[[1, 1, 1, 1]])
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
    from rekd_deploy.cli.bench import app
    from rekd_train.cli.command import run

    output = tmp_path / "latency.json"
    arguments = ["latency", str(repository), "--batches", "1", "--lengths", "16", "--rounds", "3", "--warmup", "0",
                 "--threads", "1", "-o", str(output)]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        run(app, arguments)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["kind"] == "latency"
    result = read_result(output, "latency")
    assert result.figures["cells"][0]["rounds"] == 15, "five times as many at batch 1"
    assert result.inputs["repository 1"].sha256


def test_a_list_that_is_none_is_a_usage_error(repository, capsys):
    from rekd_deploy.cli.bench import app
    from rekd_train.cli.command import run

    with pytest.raises(SystemExit) as ended:
        run(app, ["latency", str(repository), "--batches", "1,two"])
    assert ended.value.code == 2 and "1,two" in capsys.readouterr().err


@pytest.mark.parametrize("operator", ["compact", "zero"])
def test_pytorch_in_fp16_is_another_form_that_answers_alike(operator):
    batches = [dict(full_batches(make_rationalizer().preprocessor, 2, 16).encoded[0].inputs)]
    roles, model = (BOTH, COMPACTED) if operator == "compact" else (PREDICTOR, CLASSIFIER)
    found = {}
    for precision in ("fp32", "fp16"):
        line = Networks(model, make_rationalizer(operator=operator), roles)
        (way,), not_run = pytorch_runnables(line, batches, "cpu", [PYTORCH], precision=precision)
        assert not_run == [] and way.variant.precision == precision
        found[precision] = way(0)
    np.testing.assert_allclose(found["fp16"], found["fp32"], rtol=0.02)
    assert not np.array_equal(found["fp16"], found["fp32"])
