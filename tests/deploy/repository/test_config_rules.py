"""What exports write has no mistake that Triton stops at, crashes on or ignores; graphs fit the configurations."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
from config_rules import config_mistakes, engine_mistakes, file_mistakes
from families import KINDS
from reference_repository import FLAVOURS, reference_artefacts, reference_configs

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import ENSEMBLE, PREDICTOR, SELECTOR, ServingSettings, graph_mistakes
from rekd_deploy.repository.manifest import Versions, pin_versions
from rekd_deploy.repository.text_endpoint import raw_configs
from rekd_deploy.repository.warmups import model_files
from rekd_deploy.runtimes.tensorrt import PRODUCTS


def mistakes_of(artefacts, settings, target="python"):
    """In all that is written: models, the text or image endpoint, the files beside them, in a second version, too."""
    configs = build_configs(artefacts, settings, target) | raw_configs(artefacts, settings)
    pin_versions(configs, Versions(2, (1,)))
    files, found = model_files(configs, artefacts), config_mistakes(configs)
    for name, config in configs.items():
        found += file_mistakes(
            config, {file.removeprefix(f"{name}/"): c for file, c in files.items() if file.startswith(f"{name}/")}
        )
    return found


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_model(kind, single):
    model, nothing = KINDS[kind](), Path("not needed")
    manifest = {"policy": model.policy.model_dump()}
    made = Artefacts(
        pair_signature(model), nothing, nothing, model.preprocessor, tuple(model.labels), manifest,
        nothing if single else None,
    )
    for target in ("python", "onnxruntime"):
        for settings in (ServingSettings(), ServingSettings(max_batch_size=3, gpu=True, gpus=(1, 0), instances=2)):
            assert mistakes_of(made, settings, target) == []


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("flavour", sorted(FLAVOURS))
def test_every_flavour(rationalizer, flavour, single):
    target, product, settings = FLAVOURS[flavour]
    artefacts = reference_artefacts(rationalizer, single=single)
    for lengths in (None, (16, 48)) if product else (None,):
        request = EngineRequest(settings.max_batch_size, lengths=lengths)
        planned = plan_engines(artefacts, PRODUCTS[product], request) if product else artefacts
        assert mistakes_of(planned, replace(settings, rate_limit=True), target) == []
        for role, entry in planned.manifest.get("artefacts", {}).items():
            config = build_configs(planned, settings, target)[f"rekd_{role}"]
            assert engine_mistakes(config, entry["engine"]) == []


# the rules find what they are for


@pytest.fixture
def configs(artefacts):
    return copy.deepcopy(build_configs(artefacts, ServingSettings()))


def _set(model, change):
    return lambda configs: change(configs[model])


def _step(index, change):
    return lambda configs: change(configs[ENSEMBLE].ensemble_scheduling.step[index])


def _warm_up(name):
    return lambda configs: next(w for w in configs[SELECTOR].model_warmup if w.name == "warm-16-1").inputs[name]


MISTAKES = {
    "named 'other'": _set(SELECTOR, lambda c: setattr(c, "name", "other")),
    r"dims \[-2\]": _set(SELECTOR, lambda c: c.output[2].dims.__setitem__(0, -2)),
    "input input_ids is declared twice": _set(SELECTOR, lambda c: c.input.append(c.input[0])),
    "parameter threads is unknown": _set(SELECTOR, lambda c: setattr(c.parameters["threads"], "string_value", "1")),
    "intra_op_thread_count '-1' must be": _set(
        SELECTOR, lambda c: setattr(c.parameters["intra_op_thread_count"], "string_value", "-1")
    ),
    "instance_group must have a count": _set(SELECTOR, lambda c: setattr(c.instance_group[0], "count", 0)),
    "is not KIND_GPU": _set(SELECTOR, lambda c: c.instance_group[0].gpus.append(0)),
    "sequence_batching is not allowed": _set(SELECTOR, lambda c: c.sequence_batching.SetInParent()),
    "optional is not allowed": _set(SELECTOR, lambda c: setattr(c.input[0], "optional", True)),
    "preferred_batch_size 65": _set(SELECTOR, lambda c: c.dynamic_batching.preferred_batch_size.append(65)),
    "dynamic_batching is not allowed": _set(ENSEMBLE, lambda c: c.dynamic_batching.SetInParent()),
    "rekd: max_batch_size 128 is above 64": _set(ENSEMBLE, lambda c: setattr(c, "max_batch_size", 128)),
    "step rekd_gone is not in this repository": _step(0, lambda s: setattr(s, "model_name", "rekd_gone")),
    "nothing before it produces ghost": _step(1, lambda s: s.input_map.__setitem__("kept", "ghost")),
    "output logits is produced by no step": _step(1, lambda s: s.output_map.pop("logits")),
    "scores is used by nothing": _set(ENSEMBLE, lambda c: c.output.pop(0)),
    "Triton deadlocks": lambda configs: configs[ENSEMBLE].output.append(configs[SELECTOR].output[2]),
    "must give exactly the inputs": _set(SELECTOR, lambda c: c.model_warmup.add(name="w", batch_size=1)),
    "warm-up w is outside 1..max_batch_size": _set(SELECTOR, lambda c: c.model_warmup.add(name="w", batch_size=65)),
    "data of input_ids must be": lambda configs: setattr(_warm_up("input_ids")(configs), "random_data", True),
    "data of attention_mask must be": lambda configs: setattr(_warm_up("attention_mask")(configs), "zero_data", True),
    "the backend python ignores CUDA graphs": _set(SELECTOR, lambda c: setattr(c.optimization.cuda, "graphs", True)),
    "graph_spec of batch 65 is outside": _set(SELECTOR, lambda c: c.optimization.cuda.graph_spec.add(batch_size=65)),
    "execution_accelerators: cuda with use_tf32 0": _set(
        SELECTOR, lambda c: c.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    ),
    "allow_ragged_batch of input_ids": _set(SELECTOR, lambda c: setattr(c.input[0], "allow_ragged_batch", False)),
}


@pytest.mark.parametrize("complaint", MISTAKES)
def test_a_planted_mistake_is_found(configs, complaint):
    MISTAKES[complaint](configs)
    assert any(re.search(complaint, mistake) for mistake in config_mistakes(configs)), config_mistakes(configs)


def test_planted_mistakes_of_engines_and_files_are_found(rationalizer, artefacts, configs):
    config = reference_configs(rationalizer, flavour="tensorrt")[PREDICTOR]
    capacity = rationalizer.capacity
    profile = {"input_ids": [(1, 3), (8, 48), (8, 40)], "positions": [(1, 1), (8, capacity), (8, capacity)],
               "kept": [(1, 1), (8, capacity), (8, capacity)]}
    assert any("in no profile of the engine" in each for each in engine_mistakes(config, {"profiles": [profile]}))
    files = {name.removeprefix("rekd_predictor/"): content for name, content in model_files(configs, artefacts).items()}
    assert file_mistakes(configs[PREDICTOR], files) == []
    for name in ("labels.txt", "warmup/kept-16"):
        assert any(name in each for each in file_mistakes(configs[PREDICTOR], {**files, name: b""}))


# what is checked before anything is written: a graph against its configuration


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
    assert graph_mistakes(configs[SELECTOR], artefacts.selector) == []
    change(configs[SELECTOR])
    assert any(re.search(complaint, mistake) for mistake in graph_mistakes(configs[SELECTOR], artefacts.selector))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1), "free batch axis"),
        (lambda m: setattr(m, "ir_version", 11), "ONNX IR 11; Triton 24.10 reads up to 10"),
        (lambda m: setattr(m.opset_import[0], "version", 22), "opset 22; Triton 24.10 reads up to 21"),
        (lambda m: next(n for n in m.graph.node if n.op_type == "Attention").input.extend(["", "scores"]),
         "adds a mask to all heads at once"),
    ],
)
def test_graph_that_the_real_backend_could_not_run(artefacts, tmp_path, change, complaint):
    import onnx

    config = build_configs(artefacts, ServingSettings(), "onnxruntime")[SELECTOR]
    assert graph_mistakes(config, artefacts.selector) == []
    model = onnx.load(str(artefacts.selector))
    change(model)
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    assert any(complaint in mistake for mistake in graph_mistakes(config, path))
