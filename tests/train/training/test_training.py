"""Training on tasks with a planted signal: every stage learns, and what is kept is the best."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from toys import Recorder, toy_config, toy_images, toy_texts

from rekd_train.errors import ConfigError, TrainingError
from rekd_train.evaluation.forward import measure
from rekd_train.training.runtime import Runtime
from rekd_train.training.stages import compact_pair, fit, same_sizes
from rekd_train.training.state import StateStore
from rekd_train.training.validation import KEEP_ALL, calibrate_pair

LONG = {"classifier_epochs": 8, "rationale_epochs": 10, "compact_epochs": 4, "evaluate_every": 2}


@pytest.fixture(scope="module", params=[toy_texts, toy_images], ids=["texts", "images"])
def trained(request):
    """A pair trained alone, its splits and its log."""
    pair, train, dev = request.param()
    log = Recorder()
    fit(toy_config(stages=LONG), pair, train, dev, observer=log)
    return pair, train, dev, log


def test_every_stage_lowers_its_loss(trained):
    log = trained[3]
    assert [name for name, *_ in log.stages] == ["classifier", "selector", "rationale", "compact"]
    for stage, readings in log.values.items():
        assert readings[-1]["loss"] < readings[0]["loss"], stage


def test_the_planted_signal_is_found_within_the_budget(trained):
    pair, _, dev, _ = trained
    figures = measure(pair, dev)
    assert figures["accuracy"] > 0.95 and figures["rate"] == pytest.approx(0.15, abs=0.02)
    assert figures["rate_max"] <= 0.3 and pair.predictor.operator == "compact" and not pair.training


def test_a_student_learns_the_teacher_s_rationales(trained):
    teacher, train, dev, _ = trained
    make = toy_images if "pixels" in train.inputs([0]) else toy_texts
    student, *_ = make(seed=4)
    log = Recorder()
    fit(toy_config(stages=LONG), student, train, dev, teacher=copy.deepcopy(teacher), observer=log)
    assert "distillation" in log.values
    rationale = log.losses("distillation", "rationale")
    assert rationale[-1] < 0.8 * rationale[0]
    assert measure(student, dev)["accuracy"] > (0.9 if make is toy_texts else 0.6), "chance is a half, a third"


def test_self_distillation_of_a_pair_of_the_same_configuration(trained):
    teacher, train, dev, _ = trained
    make = toy_images if "pixels" in train.inputs([0]) else toy_texts
    student, *_ = make(seed=0)
    fit(toy_config(), student, train, dev, teacher=teacher)
    assert measure(student, dev)["examples"] == len(dev)


def short(make=toy_texts, observer=None, teacher=None, warm=False, generator_seed=0, **changes):
    pair, train, dev = make()
    torch.manual_seed(generator_seed)
    fit(toy_config(**changes), pair, train, dev, observer=observer, teacher=teacher, warm=warm)
    return pair


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_seed_fixes_everything_and_another_changes_it():
    one = short()
    assert same(one, short(generator_seed=9)), "whatever the state of torch's own generator"
    assert not same(one, short(**{"seed": 4}))


def test_the_selector_starts_from_a_predictor_of_its_size():
    pair, train, dev = toy_texts(equal=True)
    assert same_sizes(pair)
    log = Recorder()
    fit(toy_config(stages={"rationale_epochs": 0.03, "compact_epochs": 0}), pair, train, dev, observer=log)
    assert [name for name, *_ in log.stages] == ["classifier", "rationale"]
    mine, theirs = pair.selector.backbone, pair.predictor.backbone
    moved = [(a - b).abs().max().item() for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)]
    assert max(moved) < 0.05, "but for one step they are the same"


@pytest.mark.parametrize("setting", [{"weights": "mine"}, {"word_embeddings": "minilm"}])
def test_a_selector_with_pretrained_weights_of_its_own_keeps_them(setting):
    pair, train, dev = toy_texts(equal=True)
    before = copy.deepcopy(pair.selector.backbone)
    quick = {"classifier_epochs": 1, "rationale_epochs": 0.03, "compact_epochs": 0}
    still = {"stages": quick, "optimisation": {"learning_rate": 1e-9}}
    log = Recorder()
    fit(toy_config(selector=setting, **still), pair, train, dev, observer=log)
    assert [name for name, *_ in log.stages] == ["classifier", "selector", "rationale"]
    for mine, own in zip(pair.selector.backbone.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, own, atol=1e-5, rtol=0)
    log = Recorder()
    fit(toy_config(selector=setting, predictor=setting, **still), *toy_texts(equal=True), observer=log)
    assert [name for name, *_ in log.stages] == ["classifier", "rationale"], "one source for both"


def test_the_warm_start_of_an_unequal_selector_can_be_left_out():
    log = Recorder()
    short(observer=log, stages={"selector_warm_start": 0})
    assert "selector" not in log.values
    log = Recorder()
    short(observer=log, warm=True)
    assert list(log.values) == ["rationale", "compact"]


def test_the_warm_start_of_an_unequal_selector_teaches_its_backbone():
    stages = {"selector_warm_start": 8, "classifier_epochs": 1, "rationale_epochs": 0.03, "compact_epochs": 0}
    log = Recorder()
    short(observer=log, stages=stages)
    losses = log.losses("selector")
    assert losses[-1] < losses[0] - 0.01


def test_plain_classifier_and_plain_distillation(trained):
    teacher, train, dev, _ = trained
    make = toy_images if "pixels" in train.inputs([0]) else toy_texts
    settings = {"stages": {"rationale_epochs": 0, "masked_share": 0.0, "classifier_epochs": 4}}
    alone = short(make, **settings)
    assert alone.policy == KEEP_ALL
    distilled = short(make, teacher=teacher, distillation={"classifier": True}, **settings)
    assert not same(alone, distilled)
    brief = {"stages": {"classifier_epochs": 1, "rationale_epochs": 0.2, "compact_epochs": 0, "masked_share": 0.0}}
    taught, own = Recorder(), Recorder()
    short(make, teacher=teacher, observer=taught, **brief)
    short(make, observer=own, **brief)
    assert taught.losses("classifier") == own.losses("classifier"), "labels alone, unless the classifier is to learn"
    with pytest.raises(ConfigError, match="no stage learns from it"):
        short(make, teacher=teacher, **settings)
    with pytest.raises(ConfigError, match="plain classifier"):
        short(make, teacher=alone)
    short(make, teacher=alone, distillation={"rationale_weight": 0.0}, stages={"rationale_epochs": 0.2})


def test_the_best_state_by_dev_is_kept():
    class Rates(Recorder):
        """Remembers the weights at each evaluation."""

        def evaluated(self, values):
            super().evaluated(values)
            self.weights = getattr(self, "weights", [])
            self.weights.append([p.detach().clone() for p in pair.predictor.parameters()])
            if len(self.weights) == 5:
                with torch.no_grad():
                    pair.predictor.head[-1].weight.neg_()  # the last epoch starts badly

    pair, train, dev = toy_texts()
    log = Rates()
    stages = {"classifier_epochs": 6, "rationale_epochs": 0, "evaluate_every": 1}
    fit(toy_config(stages=stages), pair, train, dev, observer=log)
    ranks = [(figures["accuracy"], -figures["extraction_loss"]) for figures in log.evaluations["classifier"]]
    best = ranks.index(max(ranks))
    assert best < 5, "the last state is not the best: otherwise this shows nothing"
    assert all(torch.equal(a, b) for a, b in zip(log.weights[best], pair.predictor.parameters(), strict=True))
    firsts = [figures["best"] for figures in log.evaluations["classifier"]]
    assert firsts == [float(rank > max(ranks[:i], default=(-1, 0))) for i, rank in enumerate(ranks)]


def test_patience_ends_a_stage():
    log = Recorder()
    stages = {"classifier_epochs": 40, "rationale_epochs": 0, "evaluate_every": 1, "patience": 2}
    short(observer=log, stages=stages, optimisation={"learning_rate": 1e-9})
    assert len(log.evaluations["classifier"]) < 40
    assert [figures["best"] for figures in log.evaluations["classifier"][-2:]] == [0.0, 0.0]


@pytest.mark.parametrize("mode", ["served", "sampled"])
def test_dev_masks_during_training(mode):
    log = Recorder()
    stages = {"rationale_epochs": 2, "compact_epochs": 0, "evaluate_every": 1, "evaluation": mode}
    short(observer=log, stages=stages)
    rates = [figures["rate"] for figures in log.evaluations["rationale"]]
    if mode == "served":
        assert rates == pytest.approx([0.15, 0.15], abs=0.02)
    else:
        assert all(0 <= rate <= 1 for rate in rates)


def test_stored_rules():
    stages = {"rationale_epochs": 0.2, "compact_epochs": 0}
    for decision, bias in (("argmax", 0.0), ("top-k", None)):
        policy = short(selection={"decision": decision, "minimum": 1}, stages=stages).policy
        assert policy.bias == bias and policy.budget == (0.15 if decision == "top-k" else 0.3)
    policy = short(
        selection={"decision": "argmax", "budget": None, "minimum": 0, "selectable": "all"}, stages=stages
    ).policy
    assert (policy.bias, policy.budget, policy.minimum, policy.selectable) == (0.0, None, 0, "all")


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_where_padding_is_selectable_every_batch_has_all_of_it(whose):
    seen = set()
    pair, train, dev = toy_texts()
    teacher = toy_texts(seed=2)[0]
    watched_pair, selection = pair, {"selectable": "all", "denominator": "all", "penalty_on": "counts", "weight": 1e-3}
    if whose == "teacher":
        teacher.policy = teacher.policy.model_copy(update={"selectable": "all"})
        watched_pair, selection = teacher, {}
    forward = watched_pair.selector.forward

    def watched(inputs):
        seen.add(inputs["input_ids"].shape[1])
        return forward(inputs)

    watched_pair.selector.forward = watched
    fit(toy_config(selection=selection, stages={"compact_epochs": 0}), pair, train, dev, teacher=teacher)
    assert seen == {pair.preprocessor.positions}


def test_frozen_word_embeddings_of_the_selector_stay():
    pair, train, dev = toy_texts()
    before = pair.selector.backbone.table.weight.clone()
    stages = {"classifier_epochs": 0, "compact_epochs": 0}
    fit(toy_config(stages=stages, optimisation={"freeze_selector_embeddings": True}), pair, train, dev)
    assert torch.equal(pair.selector.backbone.table.weight, before)
    assert pair.selector.backbone.table.weight.requires_grad
    fit(toy_config(stages=stages), pair, train, dev)
    assert not torch.equal(pair.selector.backbone.table.weight, before)


def test_augmented_images_are_read_anew_and_the_teacher_with_them():
    pair, train, dev = toy_images(augmented=True)
    generators = []
    read = train.inputs

    def watched(indices, generator=None):
        generators.append(generator)
        return read(indices, generator)

    train.inputs = watched
    log = Recorder()
    fit(toy_config(), pair, train, dev, teacher=toy_images(seed=3)[0], observer=log)
    assert len(generators) == sum(steps for _, steps, _ in log.stages), "one batch a step, no pass over the split"
    assert all(isinstance(generator, np.random.Generator) for generator in generators)


def test_bf16_trains_too():
    pair = short(acceleration={"precision": "bf16"})
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in pair.parameters())


def test_batches_of_any_length_train_alike():
    teacher = toy_texts(seed=5)[0]
    plain, changed = Recorder(), Recorder()
    settings = {"stages": {"classifier_epochs": 1, "rationale_epochs": 1, "compact_epochs": 1}}
    short(observer=plain, teacher=teacher, **settings)
    short(observer=changed, teacher=teacher, acceleration={"length_buckets": False}, **settings)
    for stage in plain.values:
        assert changed.losses(stage) == pytest.approx(plain.losses(stage), rel=0.1), "faster, not otherwise"


def test_compaction_and_calibration_alone():
    pair, train, dev = toy_texts()
    fit(toy_config(stages={"compact_epochs": 0}), pair, train, dev)
    policy = pair.policy
    log = Recorder()
    compact_pair(toy_config(), pair, train, dev, observer=log)
    assert pair.predictor.operator == "compact" and pair.policy == policy and list(log.values) == ["compact"]
    calibrate_pair(toy_config(selection={"target": 0.25}), pair, dev)
    assert measure(pair, dev)["rate"] == pytest.approx(0.25, abs=0.02)


def test_a_diverged_run_stops():
    with pytest.raises(TrainingError, match=r"diverged, loss is nan.*fix: a lower optimisation\.learning_rate"):
        pair, train, dev = toy_texts()
        with torch.no_grad():
            pair.predictor.head[-1].bias.fill_(float("nan"))
        fit(toy_config(), pair, train, dev)


def test_a_stage_that_ends_early_does_not_hide_a_divergence(tmp_path):
    pair, train, dev = toy_texts()
    with torch.no_grad():
        pair.predictor.head[-1].bias.fill_(float("nan"))
    # dev is measured, and patience ends the stage, before the first reading of the loss
    config = toy_config(stages={"evaluate_every": 0.25, "patience": 1})
    store = StateStore(tmp_path, {})
    with pytest.raises(TrainingError, match="classifier: diverged, loss on dev is nan at step 2"):
        fit(config, pair, train, dev, store=store)
    assert not store.path.exists()


def test_weights_that_the_last_step_has_broken_are_not_kept(tmp_path):
    pair, train, dev = toy_texts()

    class Breaks(Recorder):
        def step(self, values):
            if values:  # after the last reading
                with torch.no_grad():
                    pair.predictor.head[-1].bias.fill_(float("inf"))

    store = StateStore(tmp_path, {})
    with pytest.raises(TrainingError, match="classifier: diverged, the weights' norm is nan at step 16; fix"):
        fit(toy_config(), pair, train, dev, observer=Breaks(), store=store)
    assert not store.path.exists()


@pytest.mark.parametrize(("logit", "words"), [(30.0, "larger selection.weight"), (-30.0, "smaller selection.weight")])
def test_a_collapsed_run_stops(logit, words):
    pair, train, dev = toy_texts()
    with torch.no_grad():
        pair.selector.head[-1].bias.copy_(torch.tensor([-logit, logit]))
    stages = {"classifier_epochs": 0, "rationale_epochs": 20, "collapse_window": 40}
    with pytest.raises(TrainingError, match=f"collapsed, the selector keeps .*{words}"):
        fit(toy_config(stages=stages, optimisation={"learning_rate": 1e-6}), pair, train, dev)


def test_devices_that_are_not_there():
    with pytest.raises(ConfigError, match="there is no device 'cuda:99' here"):
        Runtime("cuda:99")
    with pytest.raises(ConfigError, match="there is no device 'abacus' here"):
        Runtime("abacus")
