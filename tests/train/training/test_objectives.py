"""The configured losses: what each setting changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_rationalizer
from pytest import approx
from toys import toy_config, toy_images, toy_texts

from rekd_train.models.gates import relaxed_log_choice
from rekd_train.training import losses
from rekd_train.training.losses import gumbel, key, uniform_scalar
from rekd_train.training.objectives import ClassifierObjective, CompactObjective, RationaleObjective
from rekd_train.training.runtime import Runtime, all_batches
from rekd_train.training.stages import fit
from rekd_train.training.teacher import Teacher

CPU = Runtime("cpu")
SEED = 7


def one_batch(make=toy_texts, examples: int = 12):
    """A pair, another as its teacher, and all examples as one batch."""
    pair, train, _ = make(examples=examples)
    (batch,) = all_batches(train, CPU)
    batch.steps = 10
    return pair.train(False), make_rationalizer(9, operator="zero"), batch


@pytest.fixture
def texts():
    return one_batch()


def figures_of(texts, taught: bool = True, **changes) -> dict[str, float]:
    pair, teacher, batch = texts
    live = Teacher(teacher, CPU, "fp32") if taught else None
    found = RationaleObjective(toy_config(**changes), pair, CPU, SEED, live)(batch)
    return {name: value.item() for name, value in found.items()}


def drawn(pair, batch) -> torch.Tensor:
    """(B, N) bool: what the student's noise selects in step 0, padding too."""
    logits = pair.selector_logits(batch.inputs)
    noisy = logits + gumbel(key(SEED, 0, 0), batch.indices, logits.shape[1])
    return noisy[..., 1] > noisy[..., 0]


# distillation


def test_alpha_weighs_extraction_against_distillation_and_may_be_annealed(texts):
    half, whole, none = (figures_of(texts, distillation={"alpha": alpha}) for alpha in (0.5, 1.0, 0.0))
    assert whole["loss"] == approx(whole["extraction"])
    assert none["loss"] == approx(0.5 * none["rationale"] + none["prediction"])
    assert half["loss"] == approx((whole["loss"] + none["loss"]) / 2)
    alphas = []
    for texts[2].step in (0, 9):
        found = figures_of(texts, distillation={"alpha": "anneal"})
        distilled = 0.5 * found["rationale"] + found["prediction"]
        alphas.append((found["loss"] - distilled) / (found["extraction"] - distilled))
    assert alphas[0] == approx(0, abs=1e-6) and 0.9 < alphas[1] < 1


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.5, 0.0), (0.3, 0.7)])
def test_weights_multiply_their_terms_and_0_leaves_one_out(weights, texts):
    settings = dict(zip(("rationale_weight", "prediction_weight"), weights, strict=True))
    figures = figures_of(texts, distillation={"alpha": 0.0, **settings})
    terms = figures["rationale"], figures["prediction"]
    assert [term == 0 for term in terms] == [weight == 0 for weight in weights]
    assert figures["loss"] == approx(np.dot(weights, terms))


def test_a_hard_label_has_no_temperature(texts):
    def term(hard: bool, temperature: float) -> float:
        settings = {"start": temperature, "end": temperature}
        return figures_of(texts, temperature=settings, distillation={"hard_labels": hard})["prediction"]

    assert term(True, 1.0) == term(True, 4.0) != approx(term(False, 1.0))
    pair, teacher, batch = texts
    label = teacher.class_logits(batch.inputs, teacher.select(batch.inputs).mask).argmax(dim=1)
    ours = pair.class_logits(batch.inputs, drawn(pair, batch) & pair.selectable(batch.inputs))
    assert term(True, 1.0) == approx(torch.nn.functional.cross_entropy(ours, label).item(), rel=1e-5)


def test_hard_rationales_are_the_teacher_s_decisions_or_samples(texts):
    pair, teacher, batch = texts
    found = {
        noise: figures_of(texts, distillation={"hard_labels": True, "noise": noise})["rationale"]
        for noise in ("none", "independent")
    }
    mask, selectable = teacher.select(batch.inputs).mask, pair.selectable(batch.inputs)
    log_soft = relaxed_log_choice(pair.selector_logits(batch.inputs), 1.0, None).detach()
    slow = -sum(float(log_soft[b, n, int(mask[b, n])]) for b, n in selectable.nonzero().tolist()) / len(mask)
    assert found["none"] == approx(slow, rel=1e-5) != approx(found["independent"], rel=1e-4)


def test_the_teacher_reads_its_own_mask_or_the_student_s(texts):
    pair, teacher, batch = texts
    masks = {"teacher": teacher.select(batch.inputs).mask, "student": drawn(pair, batch)}
    student, found = pair.class_logits(batch.inputs, masks["student"]), {}
    for name, mask in masks.items():
        expected = losses.prediction_distillation(teacher.class_logits(batch.inputs, mask), student, 2.0).item()
        found[name] = figures_of(texts, distillation={"teacher_mask": name})["prediction"]
        assert found[name] == approx(expected, rel=2e-6)
    assert abs(found["teacher"] - found["student"]) > 1e-5 * found["student"]


def test_the_rationale_term_has_a_fixed_temperature_or_the_annealed_one_refreshed_now_and_then(texts):
    def term(temperature: float | None) -> float:
        settings = {"noise": "none", "rationale_temperature": temperature}
        return figures_of(texts, temperature={"refresh": 5}, distillation=settings)["rationale"]

    assert term(None) == approx(term(2.0)) != approx(term(1.0)), "tau at step 0"
    found = []
    for texts[2].step in (3, 4, 5):  # counted from 0: the fifth changes it
        found.append(term(None))
    assert found[1] == found[2] != found[0]


@pytest.mark.parametrize("augmented", [True, False])
def test_a_teacher_is_remembered_where_its_inputs_stay_the_same(augmented):
    pair, train, dev = toy_images(examples=64, augmented=augmented)
    teacher, calls = toy_images(seed=3)[0], []
    forward = teacher.selector.forward
    teacher.selector.forward = lambda inputs: (calls.append(1), forward(inputs))[1]
    stages = {"classifier_epochs": 0, "rationale_epochs": 3, "compact_epochs": 0}
    fit(toy_config(stages=stages), pair, train, dev, teacher=teacher)
    assert len(calls) == (6 if augmented else 1), "in each step, or once"


# the penalty


@pytest.mark.parametrize(("selection", "expected"), [
    ({}, lambda kept, real: (kept.sum() / real.sum() - 0.15) ** 2),
    ({"penalty_on": "counts"}, lambda kept, real: (kept.mean() - 0.15 * real.mean()) ** 2),
    ({"penalty_per": "example"}, lambda kept, real: ((kept / real - 0.15) ** 2).mean()),
    ({"penalty_per": "example", "penalty_on": "counts"}, lambda kept, real: ((kept - 0.15 * real) ** 2).mean()),
    ({"penalty_on": "counts", "denominator": "all"}, lambda kept, real: (kept.mean() - 0.15 * 48) ** 2),
    ({"penalty_on": "counts", "denominator": "all", "selectable": "all"},
     lambda kept, real: (kept.mean() - 0.15 * 48) ** 2),
])  # fmt: skip
def test_every_budget_penalty(selection, expected, texts):
    pair, teacher, batch = texts
    everything = selection.get("selectable") == "all"
    pair.policy = pair.policy.model_copy(update={"selectable": "all" if everything else "real"})
    real = pair.selector.backbone.selectable(batch.inputs)
    kept = (drawn(pair, batch) & (real | everything)).sum(dim=1).double()
    wider = replace(batch, inputs={name: torch.nn.functional.pad(t, (0, 5)) for name, t in batch.inputs.items()})
    for given in (batch,) if everything else (batch, wider):
        found = figures_of((pair, teacher, given), taught=False, selection={"weight": 1.0, **selection})
        assert found["penalty"] == approx(float(expected(kept, real.sum(dim=1).double())), rel=1e-4)
        assert found["kept"] == kept.sum()
        assert found["features"] == (12 * 48 if "denominator" in selection else real.sum())


@pytest.mark.parametrize(("make", "columns"), [(toy_texts, None), (toy_images, 3)])
def test_continuity_adds_the_borders_of_the_drawn_mask(make, columns):
    pair, _, batch = given = one_batch(make)
    without, having = (figures_of(given, taught=False, selection={"continuity": weight}) for weight in (0.0, 0.7))
    assert "discontinuity" not in without and pair.selector.backbone.columns == columns
    borders = losses.discontinuity(drawn(pair, batch).float(), pair.selectable(batch.inputs), columns).item()
    assert borders > 0 and having["discontinuity"] == approx(0.7 * borders, rel=1e-5)
    assert having["loss"] == approx(without["extraction"] + having["discontinuity"], rel=1e-5)


# the other stages


@pytest.mark.parametrize(("share", "masked"), [(0.0, 0), (1.0, 12), (0.5, None)])
def test_a_share_of_the_classifier_s_batches_is_masked(share, masked):
    pair, _, batch = one_batch(examples=32)
    objective, kept = ClassifierObjective(toy_config(stages={"masked_share": share}), pair, CPU, SEED), []
    objective.predictor.forward = lambda inputs, keep, selectable: (
        kept.append((keep.sum() / selectable.sum()).item()), torch.zeros(len(keep), 2)
    )[1]  # fmt: skip
    for batch.step in range(12):
        objective(batch)
    if masked is None:
        masked = sum(uniform_scalar(key(SEED, 0, step)) < share for step in range(12))
        assert 0 < masked < 12
    assert sum(rate < 1 for rate in kept) == masked and min(kept) > 0.15


@pytest.mark.parametrize(
    ("settings", "labels", "teacher"), [({"alpha": 0.25}, 0.25, 0.75), ({"alpha": 1.0}, 1.0, 0.0),
                                        ({"alpha": 0.25, "prediction_weight": 0.5}, 0.25, 0.375), (None, 1.0, 0.0)]
)  # fmt: skip
def test_plain_distillation_of_a_classifier(settings, labels, teacher, texts):
    pair, teacher_pair, batch = texts
    live, logits = Teacher(teacher_pair, CPU, "fp32"), pair.class_logits(batch.inputs)
    expected = labels * losses.prediction_loss(logits, batch.labels)
    expected = expected + teacher * losses.prediction_distillation(live.class_logits(batch), logits, 2.0)
    config = toy_config(stages={"masked_share": 0.0}, distillation=settings or {})
    found = ClassifierObjective(config, pair, CPU, SEED, None if settings is None else live)(batch)["loss"]
    assert found.item() == approx(expected.item(), rel=1e-5)


def test_compaction_computes_kept_features_alone_and_agrees_with_masking_the_others_out(texts, monkeypatch):
    pair, _, batch = texts
    pair.predictor.operator = "compact"
    mask = pair.select(batch.inputs).mask
    masked = losses.prediction_loss(pair.predictor(batch.inputs, mask, pair.selectable(batch.inputs)), batch.labels)
    monkeypatch.setattr(pair.predictor.backbone, "attended", None)
    given = mask[batch.indices.argsort()], None
    found = [CompactObjective(toy_config(), pair, CPU, SEED, mask=each)(batch)["loss"].item() for each in given]
    assert found == approx([masked.item()] * 2, abs=1e-5)


def test_training_mode_masks_padding_as_evaluation_does(texts):
    pair, _, batch = texts
    for module in pair.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    mask = pair.selectable(batch.inputs).float()
    training, evaluation = (pair.train(mode).class_logits(batch.inputs, mask) for mode in (True, False))
    torch.testing.assert_close(training, evaluation, rtol=0, atol=1e-5)


def test_class_weights_reach_the_cross_entropy_of_every_stage(monkeypatch):
    pair, train, dev = toy_texts(examples=64)
    train, dev = (replace(split, labels=(np.arange(64) % 4 == 0).astype(np.int64)) for split in (train, dev))
    seen, plain = [], losses.prediction_loss

    def watched(class_logits, labels, weights=None):
        expected = torch.where(labels == 1, 2.0, 2 / 3)  # 64 / (2 * 16), 64 / (2 * 48)
        seen.append(weights is not None and torch.allclose(weights, expected))
        return plain(class_logits, labels, weights)

    monkeypatch.setattr(losses, "prediction_loss", watched)
    stages = {"classifier_epochs": 0.5, "rationale_epochs": 0.5, "compact_epochs": 0.5}
    fit(toy_config(data={"class_weights": "balanced"}, stages=stages), pair, train, dev)
    assert len(seen) >= 4 and all(seen), "classifier, the selector's own, rationale, compact"
