"""Every mistake that Triton stops at, crashes on or silently ignores is named before anything is written."""

from __future__ import annotations

import copy
import re

import pytest

from rekd_deploy.repository.config import ENSEMBLE, PREDICTOR, SELECTOR, ServingSettings, build_configs
from rekd_deploy.repository.config_rules import config_mistakes, engine_mistakes, graph_mistakes


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


def _warm_up(dims=(16,), kind="input_data_file", name="input_ids", size=1, file="x", called="w"):
    def change(configs):
        warmup = configs[SELECTOR].model_warmup.add(name=called, batch_size=size)
        for tensor in ("attention_mask", name):
            given = warmup.inputs[tensor]
            given.data_type = configs[SELECTOR].input[0].data_type
            given.dims.extend(dims)
            if kind:
                setattr(given, kind, file if kind == "input_data_file" else True)

    return change


def _cuda(backend="tensorrt", size=8, graphs=True, lower=None, **shapes):
    def change(configs):
        config = configs[SELECTOR]
        config.backend = backend
        config.optimization.cuda.graphs = graphs
        spec = config.optimization.cuda.graph_spec.add(batch_size=size)
        for tensor, dims in (shapes or {"input_ids": [16], "attention_mask": [16]}).items():
            spec.input[tensor].dim.extend(dims)
            if lower:
                spec.graph_lower_bound.batch_size = lower[0]
                spec.graph_lower_bound.input[tensor].dim.append(lower[1])

    return change


def _accelerated(backend="onnxruntime", **parameters):
    def change(configs):
        config = configs[SELECTOR]
        config.backend = backend
        config.instance_group[0].kind = config.instance_group[0].KIND_GPU
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        accelerator.parameters.update(parameters)

    return change


def _parameter(key, value, backend="onnxruntime"):
    def change(configs):
        configs[SELECTOR].backend = backend
        configs[SELECTOR].parameters[key].string_value = value

    return change


def _on_gpus(*gpus, kind=1):
    def change(configs):
        group = configs[SELECTOR].instance_group[0]
        group.kind = kind
        group.gpus.extend(gpus)

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
    "intra_op_thread_count '-1' must be": _set(
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
    "warm-up w: input_ids needs the input's type and concrete dims": _warm_up(dims=(-1,)),
    "random_data for input_ids draws any value": _warm_up(kind="random_data"),
    "zero_data for attention_mask is an empty input": _warm_up(kind="zero_data"),
    "input_ids has no data": _warm_up(kind=None),
    r"'\.\./x' is no name of a file": _warm_up(file="../x"),
    "warm-up w: batch_size 65": _warm_up(size=65),
    "warm-up w: batch_size 0": _warm_up(size=0),
    "warm-up warm-16-1 is there twice": _warm_up(called="warm-16-1"),
    "the backend python ignores CUDA graphs": _cuda("python"),
    "graph_spec has no effect": _cuda(graphs=False),
    "graph_spec of batch 65": _cuda(size=65),
    "graph_spec of batch 8 must give exactly the inputs": _cuda(input_ids=[16]),
    "graph_spec of batch 8: input_ids needs concrete dims": _cuda(input_ids=[-1], attention_mask=[16]),
    "batch 8: graph_lower_bound of batch 9 is outside 1..8": _cuda(lower=(9, 16)),
    "batch 8: graph_lower_bound of batch 0 is outside 1..8": _cuda(lower=(0, 16)),
    "batch 8: graph_lower_bound needs its very dims": _cuda(lower=(2, 8)),
    "must be cuda with use_tf32 0 alone": _accelerated(use_tf32="1"),
    "must be cuda with use_tf32 0 alone, else": _accelerated(use_tf32="0", prefer_nhwc="1"),
    "execution_accelerators are not allowed;": _accelerated("tensorrt", use_tf32="0"),
    "graph level 7": _set(SELECTOR, lambda c: setattr(c.optimization.graph, "level", 7)),
    "the backend python ignores a graph level": _set(SELECTOR, lambda c: setattr(c.optimization.graph, "level", 1)),
    "execution_accelerators are not allowed": _set(
        SELECTOR, lambda c: c.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    ),
    "inter_op_thread_count 'two'": _parameter("inter_op_thread_count", "two"),
    "enable_mem_arena 'yes'": _parameter("enable_mem_arena", "yes"),
    "enable_mem_pattern ''": _parameter("enable_mem_pattern", ""),
    "execution_mode '2'": _parameter("execution_mode", "2"),
    "memory.enable_memory_arena_shrinkage 'all'": _parameter("memory.enable_memory_arena_shrinkage", "all"),
    "parameter enable_mem_arena is unknown": _parameter("enable_mem_arena", "1", "python"),
    "names GPUs, but is not KIND_GPU": _on_gpus(0, kind=2),
    r"gpus \[0, 0\]": _on_gpus(0, 0),
    r"gpus \[-1\]": _on_gpus(-1),
    "names profiles of an engine": _set(SELECTOR, lambda c: c.instance_group[0].profile.append("0")),
    "is passive": _set(SELECTOR, lambda c: setattr(c.instance_group[0], "passive", True)),
    "rate_limiter must have a name": _set(
        SELECTOR, lambda c: c.instance_group[0].rate_limiter.resources.add(name="", count=1)
    ),
    "sequence_batching is not allowed": _set(SELECTOR, lambda c: c.sequence_batching.SetInParent()),
    "allow_ragged_batch of input_ids is False": _set(
        SELECTOR, lambda c: setattr(c.input[0], "allow_ragged_batch", False)
    ),
    "allow_ragged_batch of attention_mask is True": _set(SELECTOR, lambda c: c.parameters.pop("pad_id")),
    "allow_ragged_batch is not allowed in an ensemble": _set(
        ENSEMBLE, lambda c: setattr(c.input[0], "allow_ragged_batch", True)
    ),
    "pad_id 'none' must be a token id": _set(
        SELECTOR, lambda c: setattr(c.parameters["pad_id"], "string_value", "none")
    ),
    "optional of input_ids": _set(SELECTOR, lambda c: setattr(c.input[0], "optional", True)),
    "reshape is not allowed": _set(SELECTOR, lambda c: c.output[0].reshape.SetInParent()),
    "scores: label_filename must be labels.txt": _set(
        SELECTOR, lambda c: setattr(c.output[0], "label_filename", "classes.txt")
    ),
    "must have its usual name": _set(SELECTOR, lambda c: setattr(c, "default_model_filename", "other.onnx")),
    "versions are 1 or more": _set(SELECTOR, lambda c: c.version_policy.specific.versions.append(0)),
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


@pytest.fixture
def for_onnxruntime(artefacts):
    return build_configs(artefacts, ServingSettings(), "onnxruntime")[SELECTOR]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: setattr(m, "ir_version", 11), "ONNX IR 11; Triton 24.10 reads up to 10"),
        (lambda m: setattr(m.opset_import[0], "version", 22), "opset 22; Triton 24.10 reads up to 21"),
        (lambda m: next(n for n in m.graph.node if n.op_type == "Attention").input.extend(["", "scores"]),
         "adds a mask to all heads at once"),
    ],
)
def test_graph_that_the_real_backend_could_not_run(for_onnxruntime, artefacts, tmp_path, change, complaint):
    import onnx

    assert graph_mistakes(for_onnxruntime, artefacts.selector) == []
    model = onnx.load(str(artefacts.selector))
    change(model)
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    assert any(complaint in mistake for mistake in graph_mistakes(for_onnxruntime, path))


def test_cuda_graphs_lie_within_a_profile(rationalizer):
    from reference_repository import reference_configs

    config = reference_configs(rationalizer, flavour="tensorrt")[PREDICTOR]
    capacity = rationalizer.capacity
    profile = {"input_ids": [(1, 3), (8, 48), (8, 48)], "positions": [(1, 1), (8, capacity), (8, capacity)],
               "kept": [(1, 1), (8, capacity), (8, capacity)]}
    config.instance_group[0].profile[:] = ["0"]
    assert engine_mistakes(config, {"profiles": [profile]}) == []
    profile["input_ids"][2] = (8, 40)
    assert any("in no profile of the engine" in mistake for mistake in engine_mistakes(config, {"profiles": [profile]}))
