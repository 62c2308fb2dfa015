"""Noise keyed by example and step; formulas by hand and against the authors' code; what each setting changes."""

from __future__ import annotations

import json
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
from rekd_train.inputs.policy import SelectionPolicy, mask_by_specification
from rekd_train.models.base import relaxed_log_choice, selection_scores
from rekd_train.training import losses
from rekd_train.training.losses import gumbel, key, refreshed_step, uniform, uniform_scalar
from rekd_train.training.objectives import (
    ClassifierObjective,
    CompactObjective,
    RationaleObjective,
)  # fmt: skip
from rekd_train.training.runtime import Runtime, all_batches, example_weights
from rekd_train.training.stages import fit
from rekd_train.training.teacher import Teacher
from rekd_train.training.votes import EvidenceObjective, VoteObjective

CASES = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())


def test_a_draw_belongs_to_its_example_and_position_not_to_the_batch():
    examples = torch.tensor([5, 1000, 3, 77])
    whole = gumbel(key(1, 2, 3), examples, 9)
    parts = torch.cat([gumbel(key(1, 2, 3), examples[:1], 9), gumbel(key(1, 2, 3), examples[1:], 9)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[:, :4], gumbel(key(1, 2, 3), examples, 4)), "a wider batch draws the same"
    first = uniform(key(1, 2, 3), examples, 18)[0, 0].item()
    assert first == approx(0.46558219, abs=1e-7), "as in every run before"


def test_draws_are_uniform_and_uncorrelated_and_gumbel_noise_selects_with_the_probability_of_the_logits():
    draws = uniform(key(7, 0), torch.arange(2000), 100).double()
    assert draws.min() > 0 and draws.max() < 1 and draws.mean().item() == approx(0.5, abs=0.003)
    counts = torch.histc(draws.float(), bins=20, min=0, max=1) / draws.numel()
    assert (counts - 0.05).abs().max() < 0.002
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert abs(((a - 0.5) * (b - 0.5)).mean().item() * 12) < 0.01
    host = [uniform_scalar(key(9, step)) for step in range(2000)]
    assert sum(host) / len(host) == approx(0.5, abs=0.02) and min(host) > 0 and max(host) < 1
    noise = gumbel(key(3), torch.arange(20_000), 1)[:, 0]
    assert torch.isfinite(noise).all() and noise.mean().item() == approx(0.5772, abs=0.02), "Euler's constant"
    chosen = ((torch.tensor([0.0, 1.0]) + noise).argmax(dim=1) == 1).double().mean().item()
    assert chosen == approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.01)


LINE = [[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
GRID = [[1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0, 1]]  # a block of 2 x 2 in a corner; a chess board


@pytest.mark.parametrize(("mask", "real", "columns", "borders"), [
    (LINE, 6, None, (3 / 6 + 0) / 2),
    (LINE, 4, None, (1 / 4 + 0) / 2),  # the last kept one is padding, and the border to it is no border
    (GRID, 9, 3, (4 / 9 + 12 / 9) / 2),
    (GRID, 9, None, (3 / 9 + 8 / 9) / 2),  # read as a line
])  # fmt: skip
def test_discontinuity_counts_neighbours_that_differ(mask, real, columns, borders):
    mask = torch.tensor(mask, dtype=torch.float32)
    selectable = (torch.arange(mask.shape[1]) < real).expand(mask.shape)
    assert losses.discontinuity(mask, selectable, columns).item() == approx(borders)


def test_the_term_of_marks_by_hand():
    logits = torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], [[0.5, 0.5]] * 3]).log()
    marks = torch.tensor([[2.0, 0.0, 1.0], [float("nan")] * 3])
    selectable = torch.tensor([[True, True, False], [True] * 3])
    first, second = -(0.9 * np.log(0.8) + 0.1 * np.log(0.2)), -(0.1 * np.log(0.4) + 0.9 * np.log(0.6))
    found = losses.mark_distillation(marks, logits, selectable, 0.1, 0.5).item()
    assert found == approx((2 * first + 0.5 * second) / 2, rel=1e-6)


def test_balanced_classes_count_alike_whoever_computes_which_part():
    labels = np.array([0, 0, 0, 0, 0, 2])
    weights = example_weights(labels, "balanced")
    assert weights.tolist() == approx([0.6] * 5 + [3.0]), "n / (classes that occur * examples of the class)"
    assert example_weights(labels, "none") is None
    given = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), *map(torch.from_numpy, (labels, weights))
    each = torch.nn.functional.cross_entropy(*given[:2], reduction="none")
    whole = losses.prediction_loss(*given)
    assert float(whole) == approx(float(each[:5].mean() + each[5]) / 2)
    parts = [losses.prediction_loss(*(value[part] for value in given)) for part in (slice(0, 4), slice(4, 6))]
    assert float(whole) == approx(float(parts[0] * 4 / 6 + parts[1] * 2 / 6))


# the paper's configuration

SELECTION = {"penalty_per": "batch", "penalty_on": "counts", "denominator": "all", "selectable": "all", "budget": None}


@pytest.mark.parametrize("case", CASES, ids=[f"T={case['T']}" for case in CASES])
def test_the_paper_s_configuration_gives_the_authors_losses(case):
    def log_soft(role: str) -> torch.Tensor:
        noise = -torch.log(-torch.log(torch.tensor(case[f"{role}_uniform"]) + 1e-20) + 1e-20)
        return relaxed_log_choice(torch.tensor(case[f"{role}_selector_logits"]), case["T"], noise)

    student, teacher = log_soft("student"), log_soft("teacher")
    theirs, ours = (torch.tensor(case[f"{role}_class_logits"]) for role in ("teacher", "student"))
    selection = toy_config(selection={**SELECTION, "target": case["target_sparsity"]}).selection
    mask, everything = student[..., 1] > student[..., 0], torch.ones(student.shape[:2], dtype=torch.bool)
    kept = mask.float().sum(dim=1)
    features = losses.penalised_features(everything.sum(dim=1), mask.shape[1], selection)
    penalty = losses.selection_penalty(kept, features, selection, len(mask))
    extraction = losses.prediction_loss(ours, torch.tensor(case["labels"])) + case["select_lambda"] * penalty
    rationale = losses.rationale_distillation(teacher, student, everything)
    prediction = losses.prediction_distillation(theirs, ours, case["T"])
    found = {
        "rekd_loss_alpha_0_5": (extraction + case["kd_r_lambda"] * rationale + prediction) / 2, "re_loss": extraction,
        "kd_rationale": rationale, "kd_prediction": prediction / case["T"] ** 2, "select_cost": penalty,
        "selected": kept.sum() / 3,
    }  # fmt: skip
    for name, value in found.items():
        assert float(value) == approx(case[name], rel=1e-6), name
    assert torch.equal(mask.float(), torch.tensor(case["student_mask"]).float())


def test_the_temperature_changes_in_the_authors_steps():
    # their step k = 1, 2, ...: if k % 100 == 0: tau = tau(k)
    assert [refreshed_step(step, 100) for step in range(350)] == [k // 100 * 100 for k in range(1, 351)]
    assert [refreshed_step(step, 1) for step in range(4)] == [0, 1, 2, 3]


# what each setting changes


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
    pair.predictor.use("zero" if config.stages.operator == "zero" else "compact")
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
    read = mask
    if config.stages.operator == "gather":  # of more than twice the target, the surest
        rule = SelectionPolicy(bias=0.0, budget=2 * selection.target, minimum=selection.minimum)
        scores = selection_scores(logits + noise[0]).numpy()
        read = mask & torch.from_numpy(mask_by_specification(scores, selectable.numpy(), rule))
        pair.predictor.use("compact")
    ours = pair.class_logits(inputs, read)
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
    classes = teacher.class_logits(inputs, own if settings.teacher_mask == "teacher" else read)
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
    "stages.operator=gather", "stages.operator=gather selection.target=0.05 selection.continuity=0.7",
    "stages.operator=gather selection.target=0.05 selection.minimum=5 distillation.teacher_mask=student",
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


def test_class_weights_reach_the_cross_entropy_of_every_stage(monkeypatch):
    pair, train, dev = toy_texts(examples=64)
    train, dev = (replace(split, labels=(np.arange(64) % 4 == 0).astype(np.int64)) for split in (train, dev))
    seen, plain = [], losses.prediction_loss

    def watched(class_logits, labels, weights=None):
        expected = torch.where(labels == 1, 2.0, 2 / 3)  # 64 / (2 * 16), 64 / (2 * 48)
        seen.append(weights is not None and torch.allclose(weights, expected))
        return plain(class_logits, labels, weights)

    monkeypatch.setattr(losses, "prediction_loss", watched)
    stages = {"classifier_epochs": 1, "rationale_epochs": 1, "compact_epochs": 1, "evaluate_every": 0.5}
    fit(toy_config(data={"class_weights": "balanced"}, stages=stages), pair, train, dev)
    assert len(seen) >= 12 and all(seen), "classifier, the selector's own, rationale, compact, and each on dev"


def test_beside_the_votes_a_teacher_tells_which_words_to_keep(texts):
    pair, teacher_pair, batch = texts
    teacher, found = Teacher(teacher_pair, CPU, "fp32"), {}
    heads = {name: torch.nn.Linear(pair.selector.backbone.settings.width, 2) for name in ("votes", "reader")}
    for name, changes in {"whole": {}, "classes": {"rationale_weight": 0}, "labels": {"alpha": 1.0}}.items():
        config = toy_config(distillation={"rationale_weight": 0.5, "rationale_temperature": 2.0} | changes)
        found[name] = VoteObjective(config, pair, CPU, SEED, teacher, **heads)(batch)
    alone = VoteObjective(toy_config(), pair, CPU, SEED, **heads)(batch)
    ours, theirs = ((each.selector_logits(batch.inputs) / 2).log_softmax(-1) for each in (pair, teacher_pair))
    told = losses.rationale_distillation(theirs, ours, pair.selectable(batch.inputs)).item()
    assert "rationale" not in found["labels"] and found["labels"]["loss"].item() == approx(alone["loss"].item())
    assert found["classes"]["loss"].item() != approx(alone["loss"].item()) and "rationale" not in found["classes"]
    assert found["whole"]["rationale"].item() == approx(told, rel=1e-4) and told > 0
    assert (found["whole"]["loss"] - found["classes"]["loss"]).item() == approx(told / 2, rel=1e-4)


def test_votes_say_what_words_say_whatever_the_selector_prefers():
    """Else the two agree on a code: a selector that knows the class keeps words that vote for what they do not say."""
    pair, _, batch = one_batch()
    width = pair.selector.backbone.settings.width
    votes, reader = torch.nn.Linear(width, 2), torch.nn.Linear(width, 2)
    gradients, found = [], []
    for bias in (-3.0, 3.0):
        with torch.no_grad():
            pair.selector.head[-1].bias[1] = bias
        pair.zero_grad(), votes.zero_grad()
        objective = VoteObjective(toy_config(), pair, CPU, SEED, votes=votes, reader=reader)
        loss = objective(batch)["loss"]
        loss.backward()
        gradients.append(votes.weight.grad.clone())
        found.append(loss.item())
        assert pair.selector.head[-1].weight.grad.abs().sum() > 0, "the selector learns which votes to weigh"
    assert found[0] != found[1] and gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_evidence_is_what_speaks_most_for_the_class_and_the_network_below_stays():
    pair, _, batch = one_batch()
    width, target = pair.selector.backbone.settings.width, 0.3
    config = toy_config(selection={"target": target, "budget": target, "minimum": 1})
    votes = torch.nn.Linear(width, 2)
    objective = EvidenceObjective(config, pair, CPU, SEED, votes=votes)
    figures = objective(batch)
    figures["loss"].backward()
    assert all(each.grad is None for each in (*pair.selector.backbone.parameters(), *pair.predictor.parameters()))
    assert pair.selector.head[-1].weight.grad.abs().sum() > 0 and votes.weight.grad.abs().sum() > 0

    speaks = votes(pair.selector.backbone.content(batch.inputs)).log_softmax(-1).detach().numpy()
    speaks = speaks[np.arange(len(speaks)), :, batch.labels.numpy()]
    logs, selectable = pair.selector_logits(batch.inputs).log_softmax(-1).detach(), pair.selectable(batch.inputs)
    best = mask_by_specification(speaks, selectable.numpy(), SelectionPolicy(bias=None, budget=target, minimum=1))
    chosen = -logs.gather(2, torch.from_numpy(best).long().unsqueeze(-1)).squeeze(-1)
    expected = ((chosen * selectable).sum(1) / selectable.sum(1)).mean()
    assert figures["evidence"].item() == approx(expected.item(), rel=1e-4)


def test_the_evidence_s_votes_do_not_depend_on_what_the_selector_prefers():
    pair, _, batch = one_batch()
    votes, gradients = torch.nn.Linear(pair.selector.backbone.settings.width, 2), []
    for bias in (-3.0, 3.0):
        with torch.no_grad():
            pair.selector.head[-1].bias[1] = bias
        votes.zero_grad()
        EvidenceObjective(toy_config(), pair, CPU, SEED, votes=votes)(batch)["loss"].backward()
        gradients.append(votes.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_where_there_is_no_label_the_evidence_is_for_the_teacher_s_class(texts):
    pair, teacher_pair, batch = texts
    votes = torch.nn.Linear(pair.selector.backbone.settings.width, 2)
    config, weights = toy_config(distillation={"alpha": 1.0}), torch.zeros(len(batch.labels))
    teacher = Teacher(teacher_pair, CPU, "fp32")

    def evidence(labels, weights, teacher=None):
        given = replace(batch, labels=labels, weights=weights)
        return EvidenceObjective(config, pair, CPU, SEED, teacher, votes=votes)(given)["evidence"].item()

    theirs = teacher.class_logits(batch).argmax(-1)
    assert evidence(1 - theirs, weights) == 0, "nobody says what the class is"
    assert evidence(1 - theirs, weights, teacher) == approx(evidence(theirs, None))
    assert evidence(1 - theirs, None) != approx(evidence(theirs, None))
    weights = torch.linspace(0.5, 2.0, len(theirs))
    assert evidence(theirs, weights, teacher) == approx(evidence(theirs, weights)), "classes weigh as they did"
    assert evidence(theirs, weights) != approx(evidence(theirs, None))
