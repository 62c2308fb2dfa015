"""config.pbtxt: built from the signature, parsed back whole, compared with the committed reference."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from config_rules import config_mistakes, file_mistakes
from families import KINDS
from reference_repository import FLAVOURS, REFERENCES, ROOT, reference_artefacts, reference_configs

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.contract.description import TOKENIZER, ServedDescription
from rekd_deploy.contract.signature import Slots
from rekd_deploy.errors import RepositoryError
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.repository.backend import cuda as triton_cuda
from rekd_deploy.repository.backend.model import InputChecker
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import (
    ENSEMBLE,
    PREDICTOR,
    SELECTOR,
    SINGLE,
    ServingSettings,
    config_text,
    parameters_of,
    read_config,
)
from rekd_deploy.repository.manifest import Versions, pin_versions
from rekd_deploy.repository.text_endpoint import ANSWER, PREPARE, raw_configs
from rekd_deploy.repository.warmups import label_text, model_files
from rekd_deploy.repository.writer import MANIFEST, read_description
from rekd_deploy.runtimes.tensorrt import PRODUCTS
from rekd_train.errors import ConfigError
from rekd_train.inputs.text import TextPreprocessor

MODELS = (SELECTOR, PREDICTOR, ENSEMBLE)


@pytest.fixture(scope="module")
def configs(artefacts):
    return build_configs(artefacts, ServingSettings(max_batch_size=16, instances=2, threads=3, queue_delay_us=50))


@pytest.mark.parametrize("name", MODELS)
def test_parsing_back_gives_the_same(configs, tmp_path, name):
    path = tmp_path / "config.pbtxt"
    path.write_text(config_text(configs[name]), encoding="utf-8")
    assert read_config(path) == configs[name]
    assert config_text(read_config(path)) == config_text(configs[name])


def test_members_follow_the_signature_and_the_settings(configs):
    from tritonclient.grpc.model_config_pb2 import DataType, ModelInstanceGroup

    selector = configs[SELECTOR]
    declared = [(t.name, DataType.Name(t.data_type), list(t.dims)) for t in (*selector.input, *selector.output)]
    assert declared == [
        ("input_ids", "TYPE_INT64", [-1]),
        ("attention_mask", "TYPE_INT64", [-1]),
        ("scores", "TYPE_FP32", [-1]),
        ("mask", "TYPE_BOOL", [-1]),
        ("positions", "TYPE_INT64", [-1]),
        ("kept", "TYPE_BOOL", [-1]),
    ]
    for member in (selector, configs[PREDICTOR]):
        assert (member.backend, member.max_batch_size) == ("python", 16)
        assert list(member.dynamic_batching.preferred_batch_size) == [8, 16]
        assert member.dynamic_batching.max_queue_delay_microseconds == 50
        assert [(group.count, group.kind) for group in member.instance_group] == [(2, ModelInstanceGroup.KIND_CPU)]
        assert parameters_of(member)["intra_op_thread_count"] == "3"


def test_ensemble_is_a_straight_line(configs):
    ensemble = configs[ENSEMBLE]
    assert (ensemble.platform, ensemble.backend, ensemble.max_batch_size) == ("ensemble", "", 16)
    assert not ensemble.HasField("dynamic_batching") and not ensemble.instance_group
    steps = [(step.model_name, step.model_version) for step in ensemble.ensemble_scheduling.step]
    assert steps == [(SELECTOR, -1), (PREDICTOR, -1)]
    assert config_text(ensemble).count("model_version: -1") == 2
    assert [t.name for t in ensemble.output] == ["scores", "mask", "logits", "probabilities"]


def test_ensemble_carries_what_a_client_needs(configs, rationalizer):
    described = ServedDescription.from_parameters(parameters_of(configs[ENSEMBLE]))
    assert described.preprocessor().fingerprint == rationalizer.preprocessor.fingerprint
    assert list(described.labels) == rationalizer.labels


def test_every_bad_setting_in_one_message():
    with pytest.raises(ConfigError) as error:
        ServingSettings(max_batch_size=0, instances=0, threads=-1, queue_delay_us=-5)
    assert all(name in str(error.value) for name in ("max_batch_size", "instances", "threads", "queue_delay_us"))


def test_unknown_target(artefacts):
    with pytest.raises(RepositoryError, match="'abacus'.*python"):
        build_configs(artefacts, ServingSettings(), "abacus")


@pytest.mark.parametrize("content", [b"name: ", b"unknown_field: 1", b"\xff\xfe", b'max_batch_size: "many"'])
def test_unreadable_config_is_named(tmp_path, content):
    path = tmp_path / "config.pbtxt"
    path.write_bytes(content)
    with pytest.raises(RepositoryError, match="config.pbtxt is not a Triton model configuration"):
        read_config(path)


@pytest.mark.parametrize("name", [*MODELS, SINGLE, PREPARE, ANSWER, "rekd_text"])
def test_committed_reference_is_what_the_writer_writes(rationalizer, name):
    """If this is meant to change: python tests/deploy/repository/reference_repository.py"""
    if (ROOT / MANIFEST).exists():
        pytest.skip(f"{ROOT} holds a model that rekd-export wrote; its configs are not the reference now")
    committed = read_config(ROOT / name / "config.pbtxt")
    written = reference_configs(rationalizer, read_description(ROOT).tokenizer_json)[name]
    if TOKENIZER in written.parameters:  # compressed bytes may differ between versions of zlib, the tokenizer may not
        described = [ServedDescription.from_parameters(parameters_of(config)) for config in (committed, written)]
        assert described[0] == described[1]
        committed.parameters[TOKENIZER].string_value = written.parameters[TOKENIZER].string_value
    else:
        assert (ROOT / name / "config.pbtxt").read_text(encoding="utf-8") == config_text(written)
    assert committed == written


@pytest.mark.parametrize("flavour", sorted(set(FLAVOURS) - {"python"}))
def test_committed_references_of_the_other_flavours(rationalizer, flavour):
    """If this is meant to change: python tests/deploy/repository/reference_repository.py"""
    written = reference_configs(rationalizer, flavour=flavour)
    for name in (SELECTOR, PREDICTOR):
        path = REFERENCES / flavour / name / "config.pbtxt"
        assert path.read_text(encoding="utf-8") == config_text(written[name])
        assert read_config(path) == written[name]
    same = reference_configs(rationalizer)[ENSEMBLE]
    same.max_batch_size = written[ENSEMBLE].max_batch_size
    assert written[ENSEMBLE] == same, "clients ask every flavour alike"
    assert config_mistakes(written) == []


def test_flavours_differ_in_what_their_backends_read_alone(rationalizer):
    own = {"backend", "parameters", "instance_group", "model_warmup", "optimization", "dynamic_batching",
           "max_batch_size"}
    configs = {flavour: reference_configs(rationalizer, flavour=flavour) for flavour in FLAVOURS}
    for name in (SELECTOR, PREDICTOR):
        for flavour in FLAVOURS:
            one, other = configs["python"][name], configs[flavour][name]
            python = other.backend == "python"
            assert [tensor.allow_ragged_batch for tensor in other.input] == [python] * len(other.input)
            for tensor in other.input:
                tensor.allow_ragged_batch = True
            assert {f.name for f in one.DESCRIPTOR.fields if getattr(one, f.name) != getattr(other, f.name)} <= own


@pytest.mark.parametrize(("lengths", "joined"), [(None, True), ((48,), True), ((40, 48), False)])
def test_texts_of_two_ranges_of_an_engine_are_not_joined(rationalizer, lengths, joined):
    """The shorter one would go on with the slots of the longer one: no profile of the predictor accepts that."""
    signature, nothing = pair_signature(rationalizer), Path("not needed")
    manifest = {"policy": rationalizer.policy.model_dump()}
    made = Artefacts(signature, nothing, nothing, rationalizer.preprocessor, tuple(rationalizer.labels), manifest)
    request = EngineRequest(8, batches=(1, 8), lengths=lengths)
    planned = plan_engines(made, PRODUCTS["tensorrt-rtx"], request)
    configs = build_configs(planned, ServingSettings(max_batch_size=8))
    for name in (SELECTOR, PREDICTOR):
        assert {tensor.allow_ragged_batch for tensor in configs[name].input} == {joined}
    assert config_mistakes(configs) == []


def test_instance_groups_for_cpus_one_gpu_and_several(rationalizer):
    groups = {flavour: reference_configs(rationalizer, flavour=flavour)[SELECTOR].instance_group[0]
              for flavour in FLAVOURS}
    cpu, gpu = groups["onnxruntime"].KIND_CPU, groups["onnxruntime"].KIND_GPU
    found = {flavour: (group.kind, list(group.gpus), group.count) for flavour, group in groups.items()}
    assert found["onnxruntime"] == (cpu, [], 1) and found["onnxruntime-one-gpu"] == (gpu, [0], 1)
    assert found["tensorrt"] == (gpu, [], 1) and found["tensorrt-two-gpus"] == (gpu, [0, 1], 1)
    limited = groups["onnxruntime-limited"].rate_limiter
    assert [(resource.name, resource.count) for resource in limited.resources] == [("rekd", 1)]
    assert not groups["onnxruntime"].rate_limiter.resources


def test_a_cuda_graph_and_a_warm_up_for_every_bucket(rationalizer):
    for name in (SELECTOR, PREDICTOR):
        config = reference_configs(rationalizer, flavour="tensorrt")[name]
        specs = config.optimization.cuda.graph_spec
        buckets = {(size, length) for size in (1, 8) for length in rationalizer.preprocessor.settings.buckets}
        assert config.optimization.cuda.graphs and list(config.instance_group[0].profile) == ["0"]
        assert {(spec.batch_size, spec.input["input_ids"].dim[0]) for spec in specs} == buckets
        assert {(each.batch_size, each.inputs["input_ids"].dims[0]) for each in config.model_warmup} == buckets
        slots = Slots.of(rationalizer.policy, rationalizer.capacity)
        if name == PREDICTOR:
            assert all(list(s.input["positions"].dim) == [slots.at(s.input["input_ids"].dim[0])] for s in specs)


def test_a_cuda_graph_serves_every_batch_and_no_other_length(rationalizer):
    for name in (SELECTOR, PREDICTOR):
        specs = reference_configs(rationalizer, flavour="tensorrt")[name].optimization.cuda.graph_spec
        for spec in specs:
            assert spec.graph_lower_bound.input == spec.input
        for length in rationalizer.preprocessor.settings.buckets:
            served = [
                batch
                for spec in specs
                if spec.input["input_ids"].dim[0] == length
                for batch in range(spec.graph_lower_bound.batch_size, spec.batch_size + 1)
            ]
            assert sorted(served) == list(range(1, 9)), "each batch by one graph"


def test_no_cuda_graph_is_specified_outside_a_profile(rationalizer):
    """The backend tries each specification on each profile; without any it captures each profile where it is tuned."""
    artefacts = reference_artefacts(rationalizer)
    several = plan_engines(artefacts, PRODUCTS["tensorrt"], EngineRequest(8, lengths=(16, 48)))
    for name in (SELECTOR, PREDICTOR):
        config = build_configs(several, ServingSettings(max_batch_size=8), "tensorrt")[name]
        assert list(config.instance_group[0].profile) == ["0", "1"]
        assert config.optimization.cuda.graphs and not config.optimization.cuda.graph_spec


def test_on_gpus_fp32_stays_fp32(rationalizer):
    for flavour in FLAVOURS:
        for name in (SELECTOR, PREDICTOR):
            config = reference_configs(rationalizer, flavour=flavour)[name]
            given = config.optimization.execution_accelerators.gpu_execution_accelerator
            found = [(each.name, dict(each.parameters)) for each in given]
            assert found == ([("cuda", {"use_tf32": "0"})] if flavour == "onnxruntime-one-gpu" else [])


def test_every_key_for_gpus_is_one_that_something_reads(rationalizer):
    """The table of docs/serving.md names the file that reads it."""
    section = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8").split("\n## On a GPU")[1]
    rows = re.findall(r"^\| (`[a-z_`{}., 0-9]+) \|.*(?:src/|rekd_deploy/|_model\.py).*\|$", section, re.MULTILINE)
    read = set()
    for path in re.findall(r"`([^`]+)`", " ".join(rows)):
        before, _, names = path.partition("{")
        read |= {before + name for name in names.rstrip("}").split(", ")} if names else {path}
    written = set()
    for target, product, settings in FLAVOURS.values():
        if not (settings.gpu or product):
            continue
        artefacts = reference_artefacts(rationalizer, single=True)
        if product is not None:
            artefacts = plan_engines(artefacts, PRODUCTS[product], EngineRequest(settings.max_batch_size))
        settings = replace(settings, rate_limit=True)
        configs = build_configs(artefacts, settings, target) | raw_configs(artefacts, settings)
        pin_versions(configs, Versions())
        for name, config in configs.items():
            if name not in (PREPARE, ANSWER):  # these run on CPUs
                written |= set(keys_of(config))
    assert written == read and len(read) > 40


def test_all_shapes_of_long_texts_are_captured_as_they_warm_up(rationalizer):
    preprocessor = rationalizer.preprocessor
    long = TextPreprocessor(preprocessor.tokenizer_json, replace(preprocessor.settings, max_length=512, lengths=()))
    made = replace(reference_artefacts(rationalizer, single=True), preprocessor=long)
    warm_ups = build_configs(made, ServingSettings(gpu=True))[SINGLE].model_warmup
    assert 64 < len(warm_ups) <= triton_cuda._MOST_SHAPES


def test_threads_are_written_where_the_cpu_computes(rationalizer):
    for flavour, (target, product, settings) in FLAVOURS.items():
        written = "intra_op_thread_count" in reference_configs(rationalizer, flavour=flavour)[SELECTOR].parameters
        assert written is (target == "onnxruntime" or not (settings.gpu or product))


def keys_of(message, before=""):
    """Dotted paths of the fields that are written; the names of tensors and inputs are left out."""
    for field, value in message.ListFields():
        path = before + field.name
        if field.message_type is None or field.name in ("input_map", "output_map"):
            yield path
        elif field.message_type.GetOptions().map_entry:
            for key in value:
                if hasattr(value[key], "ListFields") and field.name != "parameters":
                    yield from keys_of(value[key], f"{path}.")
                else:
                    yield f"{path}.{key}"
        else:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from keys_of(each, f"{path}.")


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("role", ["selector", "predictor", "single"])
def test_warm_ups_are_requests_that_the_model_accepts(kind, role):
    model = KINDS[kind]()
    signature, nothing = pair_signature(model), Path("not needed")
    made = Artefacts(signature, nothing, nothing, model.preprocessor, tuple(model.labels), {}, nothing)
    name = {"selector": SELECTOR, "predictor": PREDICTOR, "single": SINGLE}[role]
    configs = build_configs(made, ServingSettings())
    config, files = configs[name], model_files(configs, made)
    parameters = parameters_of(config)
    checker = InputChecker(int(parameters["max_length"]), int(parameters.get("vocabulary_size", 0)))
    assert len(config.model_warmup) == len(getattr(model.preprocessor.settings, "buckets", [0]))
    types = {tensor.name: np.dtype(tensor.dtype) for tensor in signature.graph(role).inputs}
    for warmup in config.model_warmup:
        row = {tensor: np.frombuffer(files[f"{name}/warmup/{given.input_data_file}"], types[tensor]).reshape(given.dims)
               for tensor, given in warmup.inputs.items()}
        assert checker.reason_to_refuse({tensor: array[None] for tensor, array in row.items()}) is None
    files = {file.removeprefix(f"{name}/"): content for file, content in files.items()}
    assert file_mistakes(config, files) == []


def test_labels_are_one_a_line():
    assert label_text(("good", "very\nbad")) == "good\nvery bad\n"


def test_reference_ensemble_keeps_its_version_folder():
    assert (ROOT / ENSEMBLE / "1" / ".gitkeep").is_file()
