"""The optimiser's settings reach it, for every family."""

from __future__ import annotations

import pytest
import test_bilstm
import torch
from toys import Recorder, toy_config, toy_texts

from rekd_train.config.run import OptimisationConfig
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.loop import optimiser_for, word_tables
from rekd_train.training.stages import fit


def groups(pair: Rationalizer, **settings) -> dict[int, dict]:
    """The optimiser's group of each trained parameter, by the parameter's id."""
    optimiser = optimiser_for(pair, OptimisationConfig(learning_rate=1e-3, weight_decay=0.1, **settings))
    return {id(parameter): group for group in optimiser.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("make", [lambda: toy_texts()[0], test_bilstm.make], ids=["bert", "bilstm"])
def test_word_embeddings_have_their_own_rate_and_vectors_do_not_decay(make):
    pair = make()
    tables = [pair.selector.backbone.table.weight, pair.predictor.backbone.table.weight]
    assert [id(table) for table in word_tables(pair)] == [id(table) for table in tables]
    found = groups(pair, embedding_learning_rate=1e-5)
    assert set(found) == {id(parameter) for parameter in pair.parameters()}
    for name, parameter in pair.named_parameters():
        group, word = found[id(parameter)], any(parameter is table for table in tables)
        assert group["lr"] == (1e-5 if word else 1e-3), name
        assert group["weight_decay"] == (0.0 if word or parameter.ndim == 1 else 0.1), name
    assert {group["lr"] for group in groups(pair).values()} == {1e-3}
    assert {group["weight_decay"] for group in groups(pair, decay_everything=True).values()} == {0.1}


def test_what_is_frozen_is_not_optimised():
    pair = toy_texts()[0]
    table = pair.selector.backbone.table.weight.requires_grad_(False)
    assert id(table) not in groups(pair)


def test_betas_are_as_configured_in_one_kernel():
    optimiser = optimiser_for(toy_texts()[0], OptimisationConfig(betas=(0.7, 0.8)))
    assert optimiser.defaults["betas"] == (0.7, 0.8) and optimiser.defaults["fused"] is True


def first_rates(**optimisation) -> list[float]:
    """Learning rates at the readings of a stage of 40 steps."""
    pair, train, dev = toy_texts()
    seen = Recorder()
    stages = {"classifier_epochs": 5, "rationale_epochs": 0, "compact_epochs": 0}
    fit(toy_config(stages=stages, optimisation=optimisation | {"learning_rate": 1e-3}), pair, train, dev, observer=seen)
    return [values["learning_rate"] for values in seen.values["classifier"]]


def test_the_rate_is_constant_or_decays_after_a_warm_up():
    assert first_rates(schedule="constant", warmup=0.0) == [1e-3, 1e-3]
    assert first_rates(schedule="linear", warmup=0.0) == pytest.approx([1e-3 * 21 / 41, 1e-3 / 41])
    assert first_rates(schedule="constant", warmup=0.8) == pytest.approx([1e-3 * 20 / 41 / 0.8, 1e-3])


def test_a_gradient_is_clipped_only_if_a_limit_is_set():
    stages = {"classifier_epochs": 1, "rationale_epochs": 0, "compact_epochs": 0}
    weights, norms = [], []
    for clip in (None, 1e-6, 1e6):
        pair, train, dev = toy_texts()
        seen = Recorder()
        config = toy_config(stages=stages, optimisation={"gradient_clip": clip, "weight_decay": 0.0})
        fit(config, pair, train, dev, observer=seen)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in pair.predictor.parameters()]))
        norms.append(["gradient_norm" in values for values in seen.values["classifier"]])
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1], atol=1e-4)
    assert not any(norms[0]) and all(norms[1])


def test_the_selector_s_words_can_be_frozen_in_any_family():
    _, train, dev = toy_texts()
    pair = test_bilstm.make("zero")
    before = pair.selector.backbone.table.weight.clone()
    stages = {"classifier_epochs": 0, "compact_epochs": 0, "rationale_epochs": 1}
    for frozen in (True, False):
        fit(toy_config(stages=stages, optimisation={"freeze_selector_embeddings": frozen}), pair, train, dev)
        assert torch.equal(pair.selector.backbone.table.weight, before) == frozen
