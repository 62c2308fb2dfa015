"""config.pbtxt: built from the signature, parsed back whole, held against the committed reference."""

from __future__ import annotations

import pytest
from reference_repository import FLAVOURS, REFERENCES, ROOT, reference_configs

from rekd_deploy.config_rules import config_mistakes
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository import MANIFEST, read_description
from rekd_deploy.served import TOKENIZER, ServedDescription
from rekd_deploy.triton_config import (
    ENSEMBLE,
    PREDICTOR,
    SELECTOR,
    ServingSettings,
    build_configs,
    config_text,
    parameters_of,
    read_config,
)
from rekd_train.errors import ConfigError

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


@pytest.mark.parametrize("name", MODELS)
def test_committed_reference_is_what_the_writer_writes(rationalizer, name):
    """If this is meant to change: python tests/deploy/reference_repository.py"""
    if (ROOT / MANIFEST).exists():
        pytest.skip(f"{ROOT} holds a model that rekd-export wrote; its configs are not the reference now")
    committed = read_config(ROOT / name / "config.pbtxt")
    written = reference_configs(rationalizer, read_description(ROOT).tokenizer_json)[name]
    if name == ENSEMBLE:  # compressed bytes may differ between versions of zlib, the tokenizer may not
        described = [ServedDescription.from_parameters(parameters_of(config)) for config in (committed, written)]
        assert described[0] == described[1]
        committed.parameters[TOKENIZER].string_value = written.parameters[TOKENIZER].string_value
    else:
        assert (ROOT / name / "config.pbtxt").read_text(encoding="utf-8") == config_text(written)
    assert committed == written


@pytest.mark.parametrize("flavour", sorted(set(FLAVOURS) - {"python"}))
def test_committed_references_of_the_other_flavours(rationalizer, flavour):
    """If this is meant to change: python tests/deploy/reference_repository.py"""
    written = reference_configs(rationalizer, flavour=flavour)
    for name in (SELECTOR, PREDICTOR):
        committed = (REFERENCES / flavour / name / "config.pbtxt").read_text(encoding="utf-8")
        assert committed == config_text(written[name])
    assert written[ENSEMBLE] == reference_configs(rationalizer)[ENSEMBLE], "clients ask every flavour alike"
    assert config_mistakes(written) == []


def test_reference_ensemble_keeps_its_version_folder():
    assert (ROOT / ENSEMBLE / "1" / ".gitkeep").is_file()
