"""Which export may take another's place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.repository.config import ServingSettings, build_configs
from rekd_deploy.repository.text_endpoint import raw_configs
from rekd_deploy.repository.versions import Versions, pin_versions
from rekd_deploy.server.exchange_rules import is_ensemble, model_processes, reasons_not_to_exchange, side_by_side


@pytest.fixture
def configs(artefacts):
    """A function: version -> configurations, with the ensemble of raw texts."""

    def made(version, **settings):
        chosen = ServingSettings(**settings)
        found = {**build_configs(artefacts, chosen), **raw_configs(artefacts, chosen)}
        pin_versions(found, Versions(version))
        return found

    return made


@pytest.fixture
def description(artefacts):
    return ServedDescription.of(artefacts.preprocessor, artefacts.labels)


def test_the_next_version_may(configs, description):
    assert reasons_not_to_exchange(configs(1), configs(2), description, description) == []


def test_batching_and_larger_requests_may_change(configs, description):
    new = configs(2, max_batch_size=128, preferred_batch_sizes=(4,), queue_delay_us=7, instances=2, threads=3)
    assert reasons_not_to_exchange(configs(1), new, description, description) == []


def test_a_further_model_may_come_but_none_may_go(configs, description):
    fewer = {name: config for name, config in configs(1).items() if name != "rekd_text"}
    assert reasons_not_to_exchange(fewer, configs(2), description, description) == []
    (reason,) = reasons_not_to_exchange(configs(1), {**fewer}, description, description)
    assert "lacks rekd_text" in reason


def test_smaller_requests_may_not(configs, description):
    reasons = reasons_not_to_exchange(configs(1), configs(2, max_batch_size=32), description, description)
    assert any("rekd takes 32 in a request, 64 until now" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("model", "change", "reason"),
    [
        ("rekd_predictor", lambda config: config.output[0].dims.append(3), "rekd_predictor differs in output"),
        ("rekd_prepare", lambda config: setattr(config, "backend", "other"), "rekd_prepare differs in backend"),
        ("rekd", lambda config: config.output[0].dims.append(3), "rekd has another output"),
        ("rekd_text", lambda config: config.ClearField("ensemble_scheduling"), "rekd_text is another kind"),
    ],
)
def test_what_clients_or_triton_rely_on_may_not_change(configs, description, model, change, reason):
    new = configs(2)
    change(new[model])
    assert any(reason in each for each in reasons_not_to_exchange(configs(1), new, description, description))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"labels": ("good", "bad")}, "labels are others"), ({"fingerprint": "0" * 64}, "preprocessing is another")],
)
def test_connected_clients_know_labels_and_preprocessing(configs, description, change, reason):
    (found,) = reasons_not_to_exchange(configs(1), configs(2), description, replace(description, **change))
    assert reason in found


def test_side_by_side_serves_all_versions_and_changes_nothing_else(configs):
    new = configs(3)["rekd_selector"]
    before = copy.deepcopy(new)
    both = side_by_side(new, (3, 2))
    assert list(both.version_policy.specific.versions) == [2, 3] and new == before
    both.version_policy.CopyFrom(new.version_policy)
    assert both == new


def test_processes_of_the_python_backend(configs, artefacts):
    steps = ["rekd_selector", "rekd_predictor", "rekd_prepare"]
    assert model_processes(configs(1), steps) == 3
    assert model_processes(configs(1, instances=2), steps[:2]) == 4
    assert model_processes(build_configs(artefacts, ServingSettings(), "onnxruntime"), steps[:2]) == 0


def test_ensembles(configs):
    found = configs(1)
    assert {name for name, config in found.items() if is_ensemble(config)} == {"rekd", "rekd_text"}
