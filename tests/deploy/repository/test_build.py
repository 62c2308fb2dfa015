"""config.pbtxt: as the committed references, and without a mistake that Triton stops at, crashes on or ignores."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from families import KINDS
from google.protobuf.json_format import MessageToDict
from reference_repository import (
    FLAVOURS,
    REFERENCES,
    ROOT,
    WITH_ENDPOINT,
    artefacts_of,
    configs_of,
    planned,
    reference_configs,
)

from rekd_deploy.contract.description import TOKENIZER, ServedDescription
from rekd_deploy.errors import RepositoryError
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.repository.backend import graphs as backend_graphs
from rekd_deploy.repository.build import build_configs, model_files
from rekd_deploy.repository.config import GRAPH_MODELS, ServingSettings, config_text, parameters_of, read_config
from rekd_deploy.repository.reader import MANIFEST, read_description
from rekd_deploy.runtimes.tensorrt import PRODUCTS
from rekd_train.errors import ConfigError
from rekd_train.inputs.text import TextPreprocessor

STEPS = ("rekd_selector", "rekd_predictor")


def mistakes(config, profiles=()):
    """What Triton ignores, stops at or crashes on in the configuration of a component model.

    Found on a real server and in the sources of its backends; ``profiles``: of the engine that it runs. That every
    field is one that Triton knows, protobuf holds; ensembles and labels, the same on every target, the real server.
    """
    specs, wanted = config.optimization.cuda.graph_spec, {tensor.name: list(tensor.dims) for tensor in config.input}
    warm_ups = config.model_warmup
    warmed = [(each.batch_size, {name: [*given.dims] for name, given in each.inputs.items()}) for each in warm_ups]
    captured = [(spec.batch_size, {name: [*shape.dim] for name, shape in spec.input.items()}) for spec in specs]
    for size, shapes in warmed + captured:
        pairs = [pair for name in wanted for pair in zip(shapes[name], wanted[name], strict=True)]
        if not 1 <= size <= config.max_batch_size or any(n < 1 or axis not in (-1, n) for n, axis in pairs):
            yield f"{shapes} in batches of {size} are not concrete sizes that fit {wanted}"
    if any(not 1 <= size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size):
        yield "a preferred_batch_size is outside 1..max_batch_size"
    if {tensor.allow_ragged_batch for tensor in config.input} != {"pad_id" in config.parameters}:
        yield "allow_ragged_batch must go with pad_id: nothing else pads several lengths"
    for spec, bound in ((spec, spec.graph_lower_bound) for spec in specs):
        if not 1 <= bound.batch_size <= spec.batch_size or bound.input != spec.input:
            yield f"graph_lower_bound needs a batch in 1..{spec.batch_size} and its very dims"
    numbers = [str(number) for number in range(len(profiles))] if config.backend == "tensorrt" else []
    for group in config.instance_group or [None]:
        if group is None or list(group.profile) != numbers or profiles and group.kind != group.KIND_GPU:
            yield f"an instance_group with the profiles {numbers} is needed, for an engine on a GPU"
    for name, (smallest, _, largest) in (each for profile in profiles for each in profile.items()):
        fixed = [size if size == other else -1 for size, other in zip(smallest[1:], largest[1:], strict=True)]
        given = [[size, *shapes[name]] for size, shapes in captured]
        if wanted[name] != fixed or any(list(np.clip(shape, smallest, largest)) != shape for shape in given):
            yield f"dims {wanted[name]} or CUDA graphs {given} of {name} are not the engine's {smallest}..{largest}"


def mistakes_of(artefacts, settings, target="python"):
    configs, entries = build_configs(artefacts, settings, target), artefacts.manifest.get("artefacts", {})
    profiles = {GRAPH_MODELS[role]: entry["engine"]["profiles"] for role, entry in entries.items()}
    return [each for name in configs.keys() - {"rekd"} for each in mistakes(configs[name], profiles.get(name, ()))]


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_model(kind, single):
    """That a warm-up is a request that its model accepts, a real server holds."""
    made = artefacts_of(KINDS[kind](), single)
    for target in ("python", "onnxruntime"):
        for settings in (ServingSettings(), ServingSettings(max_batch_size=3, gpu=True, gpus=(1, 0), instances=2)):
            assert mistakes_of(made, settings, target) == []
            for role, name in GRAPH_MODELS.items() if single else ():
                warm_ups = build_configs(made, settings, target)[name].model_warmup
                lengths = getattr(made.preprocessor.settings, "buckets", [0])
                assert len(warm_ups) == len(lengths) * (2 if settings.gpu else 1), role


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("flavour", sorted(FLAVOURS))
def test_every_flavour(rationalizer, flavour, single):
    target, product, settings = FLAVOURS[flavour]
    for lengths in (None, (16, 48)) if product else (None,):
        made = planned(artefacts_of(rationalizer, single), flavour, lengths)
        assert mistakes_of(made, replace(settings, rate_limit=True), target) == []
    for name, config in build_configs(made, settings, target).items():
        assert name == "rekd" or config.optimization.cuda.graphs is (target == "tensorrt")


COMMITTED = [("python", "rekd"), ("python", "rekd_single"), *((flavour, "rekd_text") for flavour in WITH_ENDPOINT)]
COMMITTED += [(flavour, name) for flavour in FLAVOURS for name in STEPS]


@pytest.mark.parametrize(("flavour", "name"), COMMITTED)
def test_committed_reference_is_what_the_writer_writes(rationalizer, flavour, name):
    """If this is meant to change: python tests/deploy/repository/reference_repository.py"""
    if flavour == "python" and (ROOT / MANIFEST).exists():
        pytest.skip(f"{ROOT} holds a model that rekd-export wrote; its configs are not the reference now")
    path, plain = REFERENCES / flavour / name / "config.pbtxt", reference_configs(rationalizer)["rekd"]
    committed = read_config(path)
    every = reference_configs(rationalizer, read_description(ROOT).tokenizer_json, flavour)
    plain.max_batch_size, written = every["rekd"].max_batch_size, every[name]
    if TOKENIZER in written.parameters:  # compressed bytes may differ between versions of zlib, the tokenizer may not
        described = [ServedDescription.from_parameters(parameters_of(config)) for config in (committed, written)]
        assert described[0] == described[1]
        committed.parameters[TOKENIZER].string_value = written.parameters[TOKENIZER].string_value
    else:
        assert path.read_text(encoding="utf-8") == config_text(written)
    assert committed == written
    for side in (plain, every["rekd"]):  # clients use every flavour alike
        side.ClearField("parameters")
    assert every["rekd"] == plain


def test_what_cannot_be_built_or_read(artefacts, tmp_path):
    with pytest.raises(ConfigError) as error:
        ServingSettings(0, (8, 0), -5, 0, -1, gpus=(1, 1))
    names = ("max_batch_size", "instances", "threads", "queue_delay_us", "gpus", "preferred_batch_sizes")
    assert all(name in str(error.value) for name in names), "all in one message"
    with pytest.raises(RepositoryError, match="'abacus'.*python"):
        build_configs(artefacts, ServingSettings(), "abacus")
    path = tmp_path / "config.pbtxt"
    for content in (b"name: ", b"unknown_field: 1", b"\xff\xfe", b'max_batch_size: "many"'):
        path.write_bytes(content)
        with pytest.raises(RepositoryError, match="config.pbtxt is not a Triton model configuration"):
            read_config(path)


def keys_of(content, path=""):
    """Dotted paths of what is written; the names of tensors are left out."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from keys_of(value, f"{path}.{key}")
    elif isinstance(content, list) and isinstance(content[0], dict):
        for each in content:
            yield from keys_of(each, path)
    else:
        named = r"(model_warmup\.inputs|graph_spec\.input|graph_lower_bound\.input|_map)\.\w+|\.string_value$"
        yield re.sub(named, r"\1", path[1:])


def test_every_key_for_gpus_is_one_that_something_reads(rationalizer):
    """The table of docs/serving.md names the file that reads it."""
    section = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8").split("\n## On a GPU")[1]
    rows = re.findall(r"^\| (`[a-z_`{}., 0-9]+) \|.*(?:src/|rekd_deploy/|_model\.py).*\|$", section, re.MULTILINE)
    read, written = set(), set()
    for path in re.findall(r"`([^`]+)`", " ".join(rows)):
        before, _, names = path.partition("{")
        read |= {before + name for name in names.rstrip("}").split(", ")} if names else {path}
    for flavour, (target, product, settings) in FLAVOURS.items():
        if settings.gpu or product:
            made = planned(artefacts_of(rationalizer, single=True), flavour)
            for config in configs_of(made, replace(settings, rate_limit=True), target).values():
                written |= {*keys_of(MessageToDict(config, preserving_proto_field_name=True))}
    assert written == read and len(read) > 40


def test_long_texts_are_captured_labels_one_a_line_and_graphs_for_the_oldest_server(rationalizer, artefacts):
    preprocessor = rationalizer.preprocessor
    long = TextPreprocessor(preprocessor.tokenizer_json, replace(preprocessor.settings, max_length=512, lengths=()))
    made = artefacts_of(rationalizer, single=True, preprocessor=long)
    warm_ups = build_configs(made, ServingSettings(gpu=True))["rekd_single"].model_warmup
    assert 64 < len(warm_ups) <= backend_graphs._MOST_SHAPES
    made = replace(artefacts, labels=("good", "very\nbad"))
    files = model_files(build_configs(made, ServingSettings()), made)
    assert files["rekd/labels.txt"] == files["rekd_predictor/labels.txt"] == b"good\nvery bad\n"
    for graph in artefacts.graphs.values():
        model = onnx.load(str(graph))
        assert model.ir_version <= 10 and all(each.version <= 21 for each in model.opset_import if each.domain == "")
    # of two ranges of an engine the shorter text would go on with the longer one's slots: no profile accepts that
    for lengths, joined in ((None, True), ((48,), True), ((40, 48), False)):
        request = EngineRequest(8, batches=(1, 8), lengths=lengths)
        made = plan_engines(artefacts_of(rationalizer), PRODUCTS["tensorrt-rtx"], request)
        configs = build_configs(made, ServingSettings(max_batch_size=8))
        assert {tensor.allow_ragged_batch for name in STEPS for tensor in configs[name].input} == {joined}
