"""config.pbtxt: as the committed references, and without a mistake that Triton stops at, crashes on or ignores."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from config_rules import config_mistakes, engine_mistakes
from families import KINDS
from reference_repository import FLAVOURS, REFERENCES, ROOT, reference_artefacts, reference_configs

from rekd_deploy.contract.description import TOKENIZER, Artefacts, ServedDescription
from rekd_deploy.errors import RepositoryError
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.repository.backend import graphs as backend_graphs
from rekd_deploy.repository.backend.model import InputChecker
from rekd_deploy.repository.build import build_configs, model_files
from rekd_deploy.repository.config import (
    ANSWER,
    ENSEMBLE,
    GRAPH_MODELS,
    PREDICTOR,
    PREPARE,
    SELECTOR,
    SINGLE,
    ServingSettings,
    config_text,
    parameters_of,
    read_config,
)
from rekd_deploy.repository.manifest import Versions, pin_versions
from rekd_deploy.repository.reader import MANIFEST, read_description
from rekd_deploy.repository.text_endpoint import endpoint_configs
from rekd_deploy.runtimes.tensorrt import PRODUCTS
from rekd_train.errors import ConfigError
from rekd_train.inputs.text import TextPreprocessor

NOTHING = Path("not needed")


def mistakes_of(artefacts, settings, target="python"):
    """In all that is written: models, the text or image endpoint, the files beside them, in a second version, too."""
    configs = build_configs(artefacts, settings, target) | endpoint_configs(artefacts, settings)
    pin_versions(configs, Versions(2, (1,)))
    return config_mistakes(configs, model_files(configs, artefacts))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_model(kind, single):
    model = KINDS[kind]()
    manifest = {"policy": model.policy.model_dump()}
    made = Artefacts(
        pair_signature(model), NOTHING, NOTHING, model.preprocessor, tuple(model.labels), manifest,
        NOTHING if single else None,
    )
    for target in ("python", "onnxruntime"):
        for settings in (ServingSettings(), ServingSettings(max_batch_size=3, gpu=True, gpus=(1, 0), instances=2)):
            assert mistakes_of(made, settings, target) == []
    configs = build_configs(made, ServingSettings())
    files = model_files(configs, made)
    for role, name in GRAPH_MODELS.items() if single else ():
        parameters, config = parameters_of(configs[name]), configs[name]
        checker = InputChecker(int(parameters["max_length"]), int(parameters.get("vocabulary_size", 0)))
        types = {tensor.name: np.dtype(tensor.dtype) for tensor in made.signature.graph(role).inputs}
        assert len(config.model_warmup) == len(getattr(model.preprocessor.settings, "buckets", [0]))
        for warmup in config.model_warmup:
            row = {
                tensor: np.frombuffer(files[f"{name}/warmup/{given.input_data_file}"], types[tensor])
                for tensor, given in warmup.inputs.items()
            }
            row = {tensor: array.reshape(1, *warmup.inputs[tensor].dims) for tensor, array in row.items()}
            assert checker.reason_to_refuse(row) is None, "a warm-up is a request that the model accepts"


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
            config = build_configs(planned, settings, target)[GRAPH_MODELS[role]]
            assert engine_mistakes(config, entry["engine"]) == []
            assert config.optimization.cuda.graphs is (target == "tensorrt")


@pytest.mark.parametrize("name", [SELECTOR, PREDICTOR, ENSEMBLE, SINGLE, PREPARE, ANSWER, "rekd_text"])
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
    assert (ROOT / ENSEMBLE / "1" / ".gitkeep").is_file()


@pytest.mark.parametrize("flavour", sorted(set(FLAVOURS) - {"python"}))
def test_committed_references_of_the_other_flavours(rationalizer, flavour):
    written = reference_configs(rationalizer, flavour=flavour)
    for name in (SELECTOR, PREDICTOR):
        path = REFERENCES / flavour / name / "config.pbtxt"
        assert path.read_text(encoding="utf-8") == config_text(written[name])
        assert read_config(path) == written[name]
    same = reference_configs(rationalizer)[ENSEMBLE]
    same.max_batch_size = written[ENSEMBLE].max_batch_size
    assert written[ENSEMBLE] == same, "clients use every flavour alike"


def test_every_bad_setting_in_one_message():
    with pytest.raises(ConfigError) as error:
        ServingSettings(0, (8, 0), -5, 0, -1, gpus=(1, 1))
    names = ("max_batch_size", "instances", "threads", "queue_delay_us", "gpus", "preferred_batch_sizes")
    assert all(name in str(error.value) for name in names)


def test_unknown_target(artefacts):
    with pytest.raises(RepositoryError, match="'abacus'.*python"):
        build_configs(artefacts, ServingSettings(), "abacus")


@pytest.mark.parametrize("content", [b"name: ", b"unknown_field: 1", b"\xff\xfe", b'max_batch_size: "many"'])
def test_unreadable_config_is_named(tmp_path, content):
    path = tmp_path / "config.pbtxt"
    path.write_bytes(content)
    with pytest.raises(RepositoryError, match="config.pbtxt is not a Triton model configuration"):
        read_config(path)


@pytest.mark.parametrize(("lengths", "joined"), [(None, True), ((48,), True), ((40, 48), False)])
def test_texts_of_two_ranges_of_an_engine_are_not_joined(rationalizer, lengths, joined):
    """The shorter one would go on with the slots of the longer one: no profile of the predictor accepts that."""
    request = EngineRequest(8, batches=(1, 8), lengths=lengths)
    planned = plan_engines(reference_artefacts(rationalizer), PRODUCTS["tensorrt-rtx"], request)
    configs = build_configs(planned, ServingSettings(max_batch_size=8))
    for name in (SELECTOR, PREDICTOR):
        assert {tensor.allow_ragged_batch for tensor in configs[name].input} == {joined}


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


def test_every_key_for_gpus_is_one_that_something_reads(rationalizer):
    """The table of docs/serving.md names the file that reads it."""
    section = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8").split("\n## On a GPU")[1]
    rows = re.findall(r"^\| (`[a-z_`{}., 0-9]+) \|.*(?:src/|rekd_deploy/|_model\.py).*\|$", section, re.MULTILINE)
    read, written = set(), set()
    for path in re.findall(r"`([^`]+)`", " ".join(rows)):
        before, _, names = path.partition("{")
        read |= {before + name for name in names.rstrip("}").split(", ")} if names else {path}
    for target, product, settings in FLAVOURS.values():
        if settings.gpu or product:
            artefacts = reference_artefacts(rationalizer, single=True)
            if product is not None:
                artefacts = plan_engines(artefacts, PRODUCTS[product], EngineRequest(settings.max_batch_size))
            settings = replace(settings, rate_limit=True)
            configs = build_configs(artefacts, settings, target) | endpoint_configs(artefacts, settings)
            pin_versions(configs, Versions())
            on_gpus = [config for name, config in configs.items() if name not in (PREPARE, ANSWER)]
            written |= {key for config in on_gpus for key in keys_of(config)}
    assert written == read and len(read) > 40


def test_all_shapes_of_long_texts_are_captured_as_they_warm_up(rationalizer):
    preprocessor = rationalizer.preprocessor
    long = TextPreprocessor(preprocessor.tokenizer_json, replace(preprocessor.settings, max_length=512, lengths=()))
    made = replace(reference_artefacts(rationalizer, single=True), preprocessor=long)
    warm_ups = build_configs(made, ServingSettings(gpu=True))[SINGLE].model_warmup
    assert 64 < len(warm_ups) <= backend_graphs._MOST_SHAPES


def test_labels_are_one_a_line(artefacts):
    made = replace(artefacts, labels=("good", "very\nbad"))
    files = model_files(build_configs(made, ServingSettings()), made)
    assert files["rekd/labels.txt"] == files["rekd_predictor/labels.txt"] == b"good\nvery bad\n"


def test_the_oldest_server_reads_the_graphs(artefacts):
    """Triton 24.10 has ONNX Runtime 1.19; that a mask is added to no heads at once: test_fusion."""
    for graph in artefacts.graphs.values():
        model = onnx.load(str(graph))
        assert model.ir_version <= 10 and all(each.version <= 21 for each in model.opset_import if each.domain == "")
