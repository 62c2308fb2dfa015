"""The loop of every stage: its optimiser, the state that is kept, and when it stops."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from toys import Recorder, toy_config, toy_texts

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import test_bilstm

from rekd_train.config.run import OptimisationConfig
from rekd_train.errors import TrainingError
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.loop import optimiser_for, word_tables
from rekd_train.training.stages import fit
from rekd_train.training.state import StateStore

FIRST_STAGE = {"classifier_epochs": 1, "rationale_epochs": 0, "compact_epochs": 0}


def groups(pair: Rationalizer, **settings) -> dict[int, dict]:
    """The optimiser's group of each trained parameter, by the parameter's id."""
    optimiser = optimiser_for(pair, OptimisationConfig(learning_rate=1e-3, weight_decay=0.1, **settings))
    return {id(parameter): group for group in optimiser.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("make", [lambda: toy_texts()[0], test_bilstm.make], ids=["bert", "bilstm"])
def test_word_embeddings_have_their_own_rate_and_vectors_do_not_decay(make):
    pair = make()
    tables = [pair.selector.backbone.table.weight, pair.predictor.backbone.table.weight]
    assert [id(table) for table in word_tables(pair)] == [id(table) for table in tables]
    found = groups(pair, embedding_learning_rate=1e-5, betas=(0.7, 0.8))
    for name, parameter in pair.named_parameters():
        group, word = found[id(parameter)], any(parameter is table for table in tables)
        decay = 0.0 if word or parameter.ndim == 1 else 0.1
        assert (group["lr"], group["weight_decay"]) == (1e-5 if word else 1e-3, decay), name
        assert group["betas"] == (0.7, 0.8) and group["fused"] is True
    assert {group["lr"] for group in groups(pair).values()} == {1e-3}
    assert {group["weight_decay"] for group in groups(pair, decay_everything=True).values()} == {0.1}
    tables[0].requires_grad_(False)
    assert id(tables[0]) not in groups(pair), "what is frozen is not optimised"


@pytest.mark.parametrize(("schedule", "warmup", "expected"), [
    ("constant", 0.0, [1e-3, 1e-3]),
    ("linear", 0.0, [1e-3 * 21 / 41, 1e-3 / 41]),
    ("constant", 0.8, [1e-3 * 20 / 41 / 0.8, 1e-3]),
])  # fmt: skip
def test_the_rate_is_constant_or_decays_after_a_warm_up(schedule, warmup, expected):
    """Read twice in a stage of 40 steps."""
    seen, optimisation = Recorder(), {"schedule": schedule, "warmup": warmup, "learning_rate": 1e-3}
    config = toy_config(stages=FIRST_STAGE | {"classifier_epochs": 5}, optimisation=optimisation)
    fit(config, *toy_texts(), observer=seen)
    assert [values["learning_rate"] for values in seen.values["classifier"]] == pytest.approx(expected)


def test_a_gradient_is_clipped_only_if_a_limit_is_set():
    weights, norms = [], []
    for clip in (None, 1e-6, 1e6):
        (pair, train, dev), seen = toy_texts(), Recorder()
        config = toy_config(stages=FIRST_STAGE, optimisation={"gradient_clip": clip, "weight_decay": 0.0})
        fit(config, pair, train, dev, observer=seen)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in pair.predictor.parameters()]))
        norms.append(["gradient_norm" in values for values in seen.values["classifier"]])
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1], atol=1e-4)
    assert not any(norms[0]) and all(norms[1])


@pytest.mark.parametrize("make", [lambda: toy_texts()[0], lambda: test_bilstm.make("zero")], ids=["bert", "bilstm"])
def test_the_selector_s_words_can_be_frozen(make):
    (_, train, dev), pair = toy_texts(), make()
    table, stages = pair.selector.backbone.table.weight, {"classifier_epochs": 0, "compact_epochs": 0}
    before = table.clone()
    for frozen in (True, False):
        fit(toy_config(stages=stages, optimisation={"freeze_selector_embeddings": frozen}), pair, train, dev)
        assert torch.equal(table, before) == frozen and table.requires_grad


def test_the_best_state_by_dev_is_kept():
    class Witness(Recorder):
        """Remembers the weights at each evaluation."""

        def evaluated(self, values):
            super().evaluated(values)
            weights.append([p.detach().clone() for p in pair.predictor.parameters()])
            if len(weights) == 5:
                with torch.no_grad():
                    pair.predictor.head[-1].weight.neg_()  # the last epoch starts badly

    (pair, train, dev), log, weights = toy_texts(), Witness(), []
    fit(toy_config(stages=FIRST_STAGE | {"classifier_epochs": 6, "evaluate_every": 1}), pair, train, dev, observer=log)
    ranks = [(figures["accuracy"], -figures["extraction_loss"]) for figures in log.evaluations["classifier"]]
    best = ranks.index(max(ranks))
    assert best < 5, "the last state is not the best: otherwise this shows nothing"
    assert all(torch.equal(a, b) for a, b in zip(weights[best], pair.predictor.parameters(), strict=True))
    firsts = [figures["best"] for figures in log.evaluations["classifier"]]
    assert firsts == [float(rank > max(ranks[:i], default=(-1, 0))) for i, rank in enumerate(ranks)]


def test_patience_ends_a_stage():
    log = Recorder()
    stages = FIRST_STAGE | {"classifier_epochs": 40, "evaluate_every": 1, "patience": 2}
    fit(toy_config(stages=stages, optimisation={"learning_rate": 1e-9}), *toy_texts(), observer=log)
    assert len(log.evaluations["classifier"]) < 40
    assert [figures["best"] for figures in log.evaluations["classifier"][-2:]] == [0.0, 0.0]


class Breaks(Recorder):
    """The last step of a stage breaks the weights after its reading."""

    def __init__(self, pair) -> None:
        super().__init__()
        self._pair = pair

    def step(self, values):
        if values:
            with torch.no_grad():
                self._pair.predictor.head[-1].bias.fill_(float("inf"))


@pytest.mark.parametrize(("broken", "stages", "match"), [
    (float("nan"), {}, r"diverged, loss is nan at step 16; fix: a lower optimisation\.learning_rate"),
    # dev is measured, and patience ends the stage, before the first reading of the loss
    (float("nan"), {"evaluate_every": 0.25, "patience": 1}, "diverged, loss on dev is nan at step 2"),
    (None, {}, "diverged, the weights' norm is nan at step 16; fix"),
])  # fmt: skip
def test_a_diverged_run_stops_and_saves_nothing(broken, stages, match, tmp_path):
    pair, train, dev = toy_texts()
    if broken is not None:
        with torch.no_grad():
            pair.predictor.head[-1].bias.fill_(broken)
    store, observer = StateStore(tmp_path, {}), Recorder() if broken else Breaks(pair)
    with pytest.raises(TrainingError, match=f"classifier: {match}"):
        fit(toy_config(stages=stages), pair, train, dev, store=store, observer=observer)
    assert not store.path.exists()


@pytest.mark.parametrize(("logit", "words"), [(30.0, "larger selection.weight"), (-30.0, "smaller selection.weight")])
def test_a_collapsed_run_stops(logit, words):
    pair, train, dev = toy_texts()
    with torch.no_grad():
        pair.selector.head[-1].bias.copy_(torch.tensor([-logit, logit]))
    stages = {"classifier_epochs": 0, "rationale_epochs": 20, "collapse_window": 40}
    with pytest.raises(TrainingError, match=f"collapsed, the selector keeps .*{words}"):
        fit(toy_config(stages=stages, optimisation={"learning_rate": 1e-6}), pair, train, dev)
