"""Every mistake that Triton stops at, crashes on or silently ignores is named before anything is written."""

from __future__ import annotations

import copy
import re

import pytest

from rekd_deploy.config_rules import config_mistakes, graph_mistakes
from rekd_deploy.triton_config import ENSEMBLE, PREDICTOR, SELECTOR, ServingSettings, build_configs


@pytest.fixture
def configs(artefacts):
    return copy.deepcopy(build_configs(artefacts, ServingSettings()))


def test_what_the_writer_makes_has_no_mistake(configs, artefacts):
    assert config_mistakes(configs) == []
    assert graph_mistakes(configs[SELECTOR], artefacts.selector) == []
    assert graph_mistakes(configs[PREDICTOR], artefacts.predictor) == []


def _set(model, change):
    return lambda configs: change(configs[model])


def _step(index, change):
    return lambda configs: change(configs[ENSEMBLE].ensemble_scheduling.step[index])


def _warm_up(dims=(16,), random=False, name="input_ids"):
    def change(configs):
        warmup = configs[SELECTOR].model_warmup.add(name="w")
        for tensor in ("attention_mask", name):
            given = warmup.inputs[tensor]
            given.data_type = configs[SELECTOR].input[0].data_type
            given.dims.extend(dims)
            setattr(given, "random_data" if random else "zero_data", True)

    return change


def _answer_what_is_handed_over(configs):
    configs[ENSEMBLE].output.append(configs[SELECTOR].output[2])


MISTAKES = {
    "named 'other'": _set(SELECTOR, lambda c: setattr(c, "name", "other")),
    "max_batch_size is 0": _set(SELECTOR, lambda c: setattr(c, "max_batch_size", 0)),
    r"dims \[0\]": _set(SELECTOR, lambda c: c.output[2].dims.__setitem__(0, 0)),
    r"dims \[-2\]": _set(SELECTOR, lambda c: c.output[2].dims.__setitem__(0, -2)),
    r"dims \[\]": _set(SELECTOR, lambda c: c.output[2].ClearField("dims")),
    "data_type is missing": _set(SELECTOR, lambda c: c.input[0].ClearField("data_type")),
    "input input_ids is declared twice": _set(SELECTOR, lambda c: c.input.append(c.input[0])),
    "no output is declared": _set(PREDICTOR, lambda c: c.ClearField("output")),
    "backend 'pyhton'": _set(SELECTOR, lambda c: setattr(c, "backend", "pyhton")),
    "parameter intra_op_threads is unknown": _set(
        SELECTOR, lambda c: setattr(c.parameters["intra_op_threads"], "string_value", "1")
    ),
    "intra_op_thread_count '-1'": _set(
        SELECTOR, lambda c: setattr(c.parameters["intra_op_thread_count"], "string_value", "-1")
    ),
    "instance_group is missing": _set(SELECTOR, lambda c: c.ClearField("instance_group")),
    "instance_group must have a count": _set(SELECTOR, lambda c: setattr(c.instance_group[0], "count", 0)),
    "preferred_batch_size 65": _set(SELECTOR, lambda c: c.dynamic_batching.preferred_batch_size.append(65)),
    "preferred_batch_size 0": _set(SELECTOR, lambda c: c.dynamic_batching.preferred_batch_size.append(0)),
    "dynamic_batching is not allowed": _set(ENSEMBLE, lambda c: c.dynamic_batching.SetInParent()),
    "rekd: instance_group is not allowed": _set(ENSEMBLE, lambda c: c.instance_group.add(count=1)),
    "model_warmup is not allowed": _set(ENSEMBLE, lambda c: c.model_warmup.add(name="w")),
    "rekd: max_batch_size 128 is above 64": _set(ENSEMBLE, lambda c: setattr(c, "max_batch_size", 128)),
    "step rekd_gone is not in this repository": _step(0, lambda s: setattr(s, "model_name", "rekd_gone")),
    "model_version must be written": _step(1, lambda s: s.ClearField("model_version")),
    "input_map must name every input": _step(1, lambda s: s.input_map.pop("kept")),
    "nothing before it produces ghost": _step(1, lambda s: s.input_map.__setitem__("kept", "ghost")),
    "scores does not have the type and dims of positions": _step(
        1, lambda s: s.input_map.__setitem__("positions", "scores")
    ),
    "has no output ghost": _step(0, lambda s: s.output_map.__setitem__("ghost", "ghost")),
    "mask is produced twice": _step(1, lambda s: s.output_map.__setitem__("logits", "mask")),
    "output logits is produced by no step": _step(1, lambda s: s.output_map.pop("logits")),
    "output logits does not have the type and dims": _set(ENSEMBLE, lambda c: c.output[2].dims.__setitem__(0, 3)),
    "scores is used by nothing": _set(ENSEMBLE, lambda c: c.output.pop(0)),
    "there is no step": _set(ENSEMBLE, lambda c: c.ClearField("ensemble_scheduling")),
    "Triton deadlocks": _answer_what_is_handed_over,
    "must give exactly the inputs": _warm_up(name="other"),
    "concrete dims": _warm_up(dims=(-1,)),
    "random_data": _warm_up(random=True),
}


@pytest.mark.parametrize("complaint", MISTAKES)
def test_mistake_is_named(configs, complaint):
    MISTAKES[complaint](configs)
    assert any(re.search(complaint, mistake) for mistake in config_mistakes(configs)), config_mistakes(configs)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: setattr(c.input[0], "data_type", 7), "input input_ids has another type in the graph"),
        (lambda c: setattr(c.input[0], "name", "ids"), "the graph's inputs are input_ids, attention_mask"),
        (lambda c: setattr(c.output[0], "name", "score"), "output score is not in the graph"),
        (lambda c: c.output[2].dims.__setitem__(0, 11), r"dims \[11\] differ from the graph's \[-1\]"),
        (lambda c: c.output[0].dims.__setitem__(0, 16), r"dims \[16\] differ from the graph's \[-1\]"),
    ],
)
def test_config_that_does_not_fit_its_graph(configs, artefacts, change, complaint):
    change(configs[SELECTOR])
    assert any(re.search(complaint, mistake) for mistake in graph_mistakes(configs[SELECTOR], artefacts.selector))


def test_graph_with_a_fixed_batch(configs, artefacts, tmp_path):
    import onnx

    model = onnx.load(str(artefacts.selector))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, str(tmp_path / "fixed.onnx"))
    assert any("free batch axis" in mistake for mistake in graph_mistakes(configs[SELECTOR], tmp_path / "fixed.onnx"))
