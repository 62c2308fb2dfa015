"""The configured losses: what each setting changes."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rationalizer
from pytest import approx
from toys import toy_config, toy_images, toy_texts

from rekd_train.config.run import checked_config
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


def figures_of(pair, batch, config, teacher=None) -> dict[str, float]:
    live = Teacher(teacher, CPU, "fp32") if teacher else None
    return {name: value.item() for name, value in RationaleObjective(config, pair, CPU, SEED, live)(batch).items()}


@torch.no_grad()
def reference(pair, teacher, batch, config) -> dict[str, float]:
    """Every figure of the rationale stage, straight from the formulas (REKD sec. 3)."""
    selection, settings, tau = config.selection, config.distillation, config.temperature
    step = batch.step if tau.refresh == 1 else (batch.step + 1) // tau.refresh * tau.refresh
    now = tau.start * (tau.end / tau.start) ** (step / batch.steps)
    inputs, selectable = batch.inputs, pair.selectable(batch.inputs)
    logits, theirs = pair.selector_logits(inputs), teacher.selector_logits(inputs)
    noise = [gumbel(key(SEED, purpose, batch.step), batch.indices, logits.shape[1]) for purpose in (0, 1)]
    mask = (logits + noise[0])[..., 1] > (logits + noise[0])[..., 0]
    kept, real = (each.sum(dim=1).double() for each in (mask & selectable, pair.selector.backbone.selectable(inputs)))
    features = torch.full_like(real, 48) if selection.denominator == "all" else real
    counts = (kept, features) if selection.penalty_per == "example" else (kept.mean(), features.mean())
    off = counts[0] - selection.target * counts[1] if selection.penalty_on == "counts" else (
        counts[0] / counts[1] - selection.target)
    figures = {"kept": kept.sum(), "features": features.sum(), "penalty": selection.weight * (off**2).mean()}
    ours = pair.class_logits(inputs, mask)
    figures["extraction"] = torch.nn.functional.cross_entropy(ours, batch.labels) + figures["penalty"]
    if selection.continuity:
        borders = losses.discontinuity(mask.float(), selectable, pair.selector.backbone.columns)
        figures["discontinuity"] = selection.continuity * borders
        figures["extraction"] = figures["extraction"] + figures["discontinuity"]
    own, noisy = teacher.select(inputs).mask, settings.noise == "independent"
    scored = [(each + noise[i] if noisy else each) for i, each in enumerate((logits, theirs))]
    warmth = settings.rationale_temperature or now
    student, target = (each / warmth for each in scored)
    decided = scored[1].argmax(dim=-1) if noisy else own.long()
    target = torch.nn.functional.one_hot(decided, 2).float() if settings.hard_labels else target.softmax(dim=-1)
    surprise = (torch.xlogy(target, target) - target * student.log_softmax(dim=-1)).sum(dim=-1)
    classes = teacher.class_logits(inputs, own if settings.teacher_mask == "teacher" else mask)
    taught = (classes / now).softmax(dim=-1)
    distance = (torch.xlogy(taught, taught) - taught * (ours / now).log_softmax(dim=-1)).sum(dim=-1).mean() * now**2
    if settings.hard_labels:
        distance = torch.nn.functional.cross_entropy(ours, classes.argmax(dim=-1))
    weights = settings.rationale_weight, settings.prediction_weight
    terms = (surprise * selectable).sum() / len(mask), distance
    figures |= {"rationale": terms[0] * (weights[0] > 0), "prediction": terms[1] * (weights[1] > 0)}
    alpha = (tau.start - now) / (tau.start - tau.end) if settings.alpha == "anneal" else settings.alpha
    loss = alpha * figures["extraction"] + (1 - alpha) * sum(map(operator.mul, weights, terms))
    return {name: float(value) for name, value in (figures | {"loss": loss}).items()}


@pytest.mark.parametrize("changes", [
    "distillation.alpha=1.0", "distillation.alpha=0.0", "distillation.alpha=anneal",
    "distillation.rationale_weight=0.0", "distillation.prediction_weight=0.0", "distillation.rationale_weight=0.3",
    "distillation.hard_labels=true", "distillation.hard_labels=true distillation.noise=independent",
    "distillation.hard_labels=true temperature.start=4.0", "distillation.noise=independent",
    "distillation.teacher_mask=student", "distillation.rationale_temperature=none",
    "distillation.rationale_temperature=none temperature.refresh=5", "temperature.refresh=5",
    "selection.penalty_on=counts", "selection.penalty_per=example", "selection.weight=3.0", "selection.continuity=0.7",
    "selection.penalty_per=example selection.penalty_on=counts",
    "selection.penalty_on=counts selection.denominator=all",
    "selection.penalty_on=counts selection.denominator=all selection.selectable=all",
])  # fmt: skip
def test_every_setting_changes_the_figures_as_the_formulas_say(changes, texts):
    pair, teacher, batch = texts
    document, everything = toy_config(selection={"weight": 1.0}).model_dump(), "selectable=all" in changes
    configs = [checked_config(document, given, Path("toy")) for given in ([], changes.split())]
    pair.policy = pair.policy.model_copy(update={"selectable": "all" if everything else "real"})
    wider = replace(batch, inputs={name: torch.nn.functional.pad(t, (0, 5)) for name, t in batch.inputs.items()})
    differ = False
    for batch.step in (0, 3, 4, 9):
        expected = reference(pair, teacher, batch, configs[1])
        for given in (batch,) if everything else (batch, replace(wider, step=batch.step)):
            plain, found = (figures_of(pair, given, config, teacher) for config in configs)
            assert found == approx(expected, rel=1e-4)
            differ |= found["loss"] != approx(plain["loss"], rel=1e-6)
    assert differ


def test_without_a_teacher_continuity_counts_the_borders_of_a_grid():
    pair, _, batch = one_batch(toy_images)
    found = figures_of(pair, batch, toy_config(selection={"continuity": 0.7}))
    noisy = pair.selector_logits(batch.inputs) + gumbel(key(SEED, 0, 0), batch.indices, 12)
    borders = losses.discontinuity((noisy[..., 1] > noisy[..., 0]).float(), pair.selectable(batch.inputs), 3).item()
    assert found["discontinuity"] == approx(0.7 * borders, rel=1e-5) and borders > 0
    assert found["loss"] == found["extraction"] and "rationale" not in found


@pytest.mark.parametrize("augmented", [True, False])
def test_a_teacher_is_remembered_where_its_inputs_stay_the_same(augmented):
    pair, train, dev = toy_images(examples=64, augmented=augmented)
    teacher, calls = toy_images(seed=3)[0], []
    forward = teacher.selector.forward
    teacher.selector.forward = lambda inputs: (calls.append(1), forward(inputs))[1]
    stages = {"classifier_epochs": 0, "rationale_epochs": 3, "compact_epochs": 0}
    fit(toy_config(stages=stages), pair, train, dev, teacher=teacher)
    assert len(calls) == (6 if augmented else 1), "in each step, or once"


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
