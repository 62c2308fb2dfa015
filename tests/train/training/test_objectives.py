"""The configured losses: the authors' figures, and what each switch changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rationalizer
from toys import toy_config, toy_images, toy_texts

from rekd_train.models.gates import relaxed_log_choice
from rekd_train.training import losses
from rekd_train.training.batches import Batch, all_batches, gumbel
from rekd_train.training.losses import refreshed_step
from rekd_train.training.objectives import ClassifierObjective, CompactObjective, RationaleObjective
from rekd_train.training.runtime import Runtime
from rekd_train.training.stages import fit
from rekd_train.training.teacher import Teacher

CASES = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())
CPU = Runtime("cpu")

PAPER = {
    "selection": {
        "penalty_per": "batch", "penalty_on": "counts", "denominator": "all", "selectable": "all", "budget": None,
    },
    "distillation": {
        "alpha": 0.5, "noise": "independent", "rationale_temperature": None, "teacher_mask": "student",
    },
}  # fmt: skip


class Scripted(torch.nn.Module):
    """A pair, selector, predictor and teacher in one that answers what it is told."""

    def __init__(self, selector_logits, class_logits) -> None:
        super().__init__()
        self._answers = torch.tensor(selector_logits), torch.tensor(class_logits)
        self.seen = None

    selector = predictor = backbone = preprocessor = property(lambda self: self)

    @property
    def positions(self):
        return self._answers[0].shape[1]

    def __call__(self, inputs, mask=None, selectable=None):
        return self._answers[0] if mask is None else self._answers[1]

    def selectable(self, inputs):
        return torch.ones(self._answers[0].shape[:2], dtype=torch.bool)

    def selector_logits(self, batch, positions):
        return self._answers[0]

    def class_logits_on(self, batch, mask):
        self.seen = mask
        return self._answers[1]


@pytest.mark.parametrize("case", CASES, ids=[f"T={case['T']}" for case in CASES])
def test_the_paper_s_configuration_gives_the_authors_losses(case, monkeypatch):
    noise = {0: case["student_uniform"], 1: case["teacher_uniform"]}

    def recorded(stream, examples, width):
        return -torch.log(-torch.log(torch.tensor(noise[stream]) + 1e-20) + 1e-20)

    monkeypatch.setattr("rekd_train.training.objectives.gumbel", recorded)
    monkeypatch.setattr(RationaleObjective, "stream", lambda self, purpose, step: purpose)
    config = toy_config(
        selection={**PAPER["selection"], "target": case["target_sparsity"], "weight": case["select_lambda"]},
        distillation={**PAPER["distillation"], "rationale_weight": case["kd_r_lambda"]},
        temperature={"start": case["T"], "end": case["T"]},
    )
    student = Scripted(case["student_selector_logits"], case["student_class_logits"])
    teacher = Scripted(case["teacher_selector_logits"], case["teacher_class_logits"])
    batch = Batch(torch.arange(3), {}, torch.tensor(case["labels"]), step=5, steps=10, examples=3, present=3)
    figures = RationaleObjective(config, student, CPU, 0, teacher)(batch)
    expected = {
        "loss": case["rekd_loss_alpha_0_5"], "extraction": case["re_loss"], "rationale": case["kd_rationale"],
        "prediction": case["kd_prediction"] * case["T"] ** 2, "penalty": case["select_lambda"] * case["select_cost"],
        "kept": case["selected"] * 3,
    }  # fmt: skip
    for name, value in expected.items():
        assert float(figures[name]) == pytest.approx(value, rel=1e-6), name
    assert torch.equal(teacher.seen, torch.tensor(case["student_mask"])), "the teacher reads the student's mask"


@pytest.fixture(scope="module")
def texts():
    """A pair, another as its teacher, one batch and its split."""
    pair, train, _ = toy_texts(examples=12)
    teacher = make_rationalizer(9, operator="zero")
    (batch,) = all_batches(train, CPU)
    batch.steps = 10
    return pair.train(False), teacher, batch


def figures_of(texts, teacher: bool = True, **changes) -> dict[str, float]:
    pair, teacher_pair, batch = texts
    live = Teacher(teacher_pair, CPU, "fp32") if teacher else None
    found = RationaleObjective(toy_config(**changes), pair, CPU, 7, live)(batch)
    return {name: value.item() for name, value in found.items()}


def test_the_temperature_changes_in_the_authors_steps():
    # their step k = 1, 2, ...: if k % 100 == 0: tau = tau(k)
    taken, current = [], 0
    for k in range(1, 351):
        current = k if k % 100 == 0 else current
        taken.append(current)
    assert [refreshed_step(step, 100) for step in range(350)] == taken
    assert [refreshed_step(step, 1) for step in range(4)] == [0, 1, 2, 3]


def test_alpha_weighs_extraction_against_distillation(texts):
    half, whole, none = (figures_of(texts, distillation={"alpha": alpha}) for alpha in (0.5, 1.0, 0.0))
    assert whole["loss"] == pytest.approx(whole["extraction"])
    assert none["loss"] == pytest.approx(0.5 * none["rationale"] + none["prediction"])
    assert half["loss"] == pytest.approx((whole["loss"] + none["loss"]) / 2)


def test_annealed_alpha_goes_from_distillation_to_extraction(texts):
    settings = {"distillation": {"alpha": "anneal"}}
    first = figures_of(texts, **settings)
    assert first["loss"] == pytest.approx(0.5 * first["rationale"] + first["prediction"]), "pure distillation"
    texts[2].step = 9
    late = figures_of(texts, **settings)
    texts[2].step = 0
    distilled = 0.5 * late["rationale"] + late["prediction"]
    alpha = (late["loss"] - distilled) / (late["extraction"] - distilled)
    assert 0.9 < alpha < 1


@pytest.mark.parametrize("part", ["rationale", "prediction"])
def test_a_weight_of_zero_leaves_its_part_out(part, texts):
    figures = figures_of(texts, distillation={f"{part}_weight": 0.0, "alpha": 0.0})
    other = "prediction" if part == "rationale" else "rationale"
    weight = 1.0 if other == "prediction" else 0.5
    assert figures[part] == 0 and figures["loss"] == pytest.approx(weight * figures[other])


def test_weights_multiply_their_parts(texts):
    weights = {"rationale_weight": 0.3, "prediction_weight": 0.7}
    figures = figures_of(texts, distillation={"alpha": 0.0, **weights})
    assert figures["loss"] == pytest.approx(0.3 * figures["rationale"] + 0.7 * figures["prediction"])


def test_hard_labels_make_the_prediction_term_a_cross_entropy_with_the_teacher_s_label(texts):
    def term(hard: bool, temperature: float) -> float:
        settings = {"start": temperature, "end": temperature}
        return figures_of(texts, temperature=settings, distillation={"hard_labels": hard})["prediction"]

    assert term(True, 1.0) != pytest.approx(term(False, 1.0))
    assert term(True, 1.0) == term(True, 4.0), "a label has no temperature"


def test_independent_noise_leaves_a_loss_between_equals(texts):
    pair, _, batch = texts
    same = (pair, pair, batch)  # self-distillation
    terms = {
        noise: figures_of(same, distillation={"noise": noise})["rationale"] for noise in ("none", "independent")
    }
    assert terms["none"] == pytest.approx(0, abs=1e-5) and terms["independent"] > 0.1


def test_the_teacher_reads_its_own_mask_or_the_student_s(texts):
    pair, teacher, batch = texts
    logits = pair.selector_logits(batch.inputs)
    stream = RationaleObjective(toy_config(), pair, CPU, 7, None).stream(0, 0)
    noisy = logits + gumbel(stream, batch.indices, logits.shape[1])
    masks = {"teacher": teacher.select(batch.inputs).mask, "student": noisy[..., 1] > noisy[..., 0]}
    student = pair.class_logits(batch.inputs, masks["student"])
    found = {}
    for name, mask in masks.items():
        expected = losses.prediction_distillation(teacher.class_logits(batch.inputs, mask), student, 2.0).item()
        found[name] = figures_of(texts, distillation={"teacher_mask": name})["prediction"]
        assert found[name] == pytest.approx(expected, rel=2e-6)
    assert abs(found["teacher"] - found["student"]) > 1e-5 * found["student"]


def test_the_rationale_term_has_the_annealed_temperature_or_a_fixed_one(texts):
    def term(**settings) -> float:
        return figures_of(texts, distillation=settings)["rationale"]

    assert term(rationale_temperature=None) == pytest.approx(term(rationale_temperature=2.0)), "tau at step 0"
    assert term(rationale_temperature=1.0) != pytest.approx(term(rationale_temperature=2.0))


def test_the_temperature_is_refreshed_every_so_many_steps(texts):
    batch = texts[2]
    found = {}
    for step in (3, 4, 5):  # counted from 0: the fifth changes it
        batch.step = step
        settings = {"temperature": {"refresh": 5}, "distillation": {"noise": "none", "rationale_temperature": None}}
        found[step] = figures_of(texts, **settings)["rationale"]
    batch.step = 0
    assert found[4] == found[5] != found[3]


def test_hard_labels_are_the_teacher_s_decisions_and_have_a_gradient_where_they_differ(texts):
    pair, teacher, batch = texts
    figures = figures_of(texts, distillation={"hard_labels": True, "noise": "none"})
    selectable = pair.selectable(batch.inputs)
    logits = pair.selector_logits(batch.inputs)
    mask = teacher.select(batch.inputs).mask
    log_soft = relaxed_log_choice(logits, 1.0, None).detach()
    slow = -sum(
        float(log_soft[b, n, int(mask[b, n])])
        for b in range(len(mask)) for n in range(mask.shape[1]) if selectable[b, n]
    ) / len(mask)  # fmt: skip
    assert figures["rationale"] == pytest.approx(slow, rel=1e-5)

    wrong = logits.detach().clone().requires_grad_()
    opposite = logits[..., 1] <= logits[..., 0]
    losses.rationale_imitation(opposite, relaxed_log_choice(wrong, 0.1, None), selectable).backward()
    assert (wrong.grad[selectable].abs().sum(dim=-1) > 0).all(), "every wrong choice is corrected"


def test_hard_labels_with_noise_are_the_teacher_s_samples(texts):
    settings = [{"hard_labels": True, "noise": noise} for noise in ("none", "independent")]
    found = [figures_of(texts, distillation=s)["rationale"] for s in settings]
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def penalties(texts, **selection) -> tuple[float, torch.Tensor, torch.Tensor, int]:
    """(penalty without its weight, kept (B,), real features (B,), positions of the longest input)."""
    pair, _, batch = texts
    figures = figures_of(texts, teacher=False, selection={"weight": 1.0, **selection})
    logits = pair.selector_logits(batch.inputs)
    objective = RationaleObjective(toy_config(), pair, CPU, 7, None)
    noisy = logits + gumbel(objective.stream(0, 0), batch.indices, logits.shape[1])
    real = pair.selector.backbone.selectable(batch.inputs)
    chosen = (noisy[..., 1] > noisy[..., 0]) & (real if selection.get("selectable", "real") == "real" else True)
    return figures["penalty"], chosen.sum(1).double(), real.sum(1).double(), pair.preprocessor.positions


def test_every_budget_penalty(texts):
    value, kept, real, width = penalties(texts)
    assert value == pytest.approx(float((kept.sum() / real.sum() - 0.15) ** 2), rel=1e-4)
    value, *_ = penalties(texts, penalty_on="counts")
    assert value == pytest.approx(float((kept.mean() - 0.15 * real.mean()) ** 2), rel=1e-4)
    value, *_ = penalties(texts, penalty_per="example")
    assert value == pytest.approx(float(((kept / real - 0.15) ** 2).mean()), rel=1e-4)
    value, *_ = penalties(texts, penalty_per="example", penalty_on="counts")
    assert value == pytest.approx(float(((kept - 0.15 * real) ** 2).mean()), rel=1e-4)
    value, *_ = penalties(texts, penalty_on="counts", denominator="all")
    assert value == pytest.approx(float((kept.mean() - 0.15 * width) ** 2), rel=1e-4)


LINE = [[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
GRID = [[1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0, 1]]  # a block of 2 x 2 in a corner; a chess board


def test_discontinuity_counts_neighbours_that_differ():
    line, grid = torch.tensor(LINE, dtype=torch.float32), torch.tensor(GRID, dtype=torch.float32)
    everything = torch.ones(2, 9, dtype=torch.bool)
    assert losses.discontinuity(line, everything[:, :6], None).item() == pytest.approx((3 / 6 + 0) / 2)
    assert losses.discontinuity(grid, everything, 3).item() == pytest.approx((4 / 9 + 12 / 9) / 2)
    assert losses.discontinuity(grid, everything, None).item() == pytest.approx((3 / 9 + 8 / 9) / 2), "read as a line"
    short = everything[:, :6].clone()
    short[:, 4:] = False  # the last kept one is padding, and the border to it is no border
    assert losses.discontinuity(line, short, None).item() == pytest.approx((1 / 4 + 0) / 2)


def test_discontinuity_fills_holes_and_drops_strays():
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1.0]], requires_grad=True)
    losses.discontinuity(mask, torch.ones(1, 16, dtype=torch.bool), 4).backward()
    assert mask.grad[0, 10] < 0, "kept on every side: keeping it lowers the loss"
    assert mask.grad[0, 7] > 0, "a kept one with more dropped than kept ones around it may go"
    assert mask.grad[0, 0] == 0, "far from everything nothing pulls"


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_continuity_adds_the_borders_of_the_drawn_mask(make):
    pair, train, _ = make(examples=12)
    (batch,) = all_batches(train, CPU)
    batch.steps = 10
    given = (pair.train(False), None, batch)
    without, having = (
        figures_of(given, teacher=False, selection={"continuity": weight}) for weight in (0.0, 0.7)
    )
    assert "discontinuity" not in without
    logits = pair.selector_logits(batch.inputs)
    stream = RationaleObjective(toy_config(), pair, CPU, 7, None).stream(0, 0)
    noisy = logits + gumbel(stream, batch.indices, logits.shape[1])
    kept = (noisy[..., 1] > noisy[..., 0]).float()
    columns = 3 if make is toy_images else None  # 16 x 12 pixels in patches of 4
    assert pair.selector.backbone.columns == columns
    borders = losses.discontinuity(kept, pair.selectable(batch.inputs), columns).item()
    assert borders > 0 and having["discontinuity"] == pytest.approx(0.7 * borders, rel=1e-5)
    assert having["extraction"] == pytest.approx(without["extraction"] + having["discontinuity"], rel=1e-5)
    assert having["loss"] == pytest.approx(having["extraction"], rel=1e-6)


def test_padding_does_not_change_a_penalty_over_all_positions(texts):
    pair, teacher, batch = texts
    wider = replace(batch, inputs={name: torch.nn.functional.pad(t, (0, 5)) for name, t in batch.inputs.items()})
    settings = {"penalty_on": "counts", "denominator": "all", "weight": 1.0}
    narrow, wide = (figures_of((pair, teacher, each), teacher=False, selection=settings) for each in (batch, wider))
    assert wide["penalty"] == pytest.approx(narrow["penalty"], rel=1e-5)
    assert wide["features"] == narrow["features"] == 12 * 48, "N is that of the longest input"


def test_every_position_can_be_selectable(texts):
    pair = texts[0]
    before = pair.policy
    try:
        pair.policy = before.model_copy(update={"selectable": "all"})
        value, kept, _, width = penalties(texts, selectable="all", denominator="all", penalty_on="counts")
    finally:
        pair.policy = before
    assert kept.max() > 0 and value == pytest.approx(float((kept.mean() - 0.15 * width) ** 2), rel=1e-4)


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_the_prediction_alone_moves_the_selector(make):
    pair, train, _ = make(examples=8)
    (batch,) = all_batches(train, CPU)
    RationaleObjective(toy_config(selection={"weight": 0.0}), pair, CPU, 7, None)(batch)["loss"].backward()
    gradient = pair.selector.head[-1].weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_training_mode_masks_padding_as_evaluation_does():
    pair, train, _ = toy_texts(examples=8)
    for module in pair.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    (batch,) = all_batches(train, CPU)
    mask = pair.selectable(batch.inputs).float()
    torch.testing.assert_close(
        pair.train().class_logits(batch.inputs, mask), pair.eval().class_logits(batch.inputs, mask), rtol=0, atol=1e-5
    )


def test_plain_distillation_of_a_classifier(texts):
    pair, teacher, batch = texts
    live = Teacher(teacher, CPU, "fp32")

    def loss(teacher, **settings) -> float:
        config = toy_config(stages={"masked_share": 0.0}, distillation=settings)
        return ClassifierObjective(config, pair, pair.predictor, CPU, 7, teacher)(batch)["loss"].item()

    logits = pair.class_logits(batch.inputs)
    term = losses.prediction_distillation(live.class_logits(batch), logits, 2.0).item()
    labels_only = losses.prediction_loss(logits, batch.labels).item()
    assert loss(None) == pytest.approx(labels_only, rel=1e-5)
    distilled = loss(live, alpha=0.25)
    assert distilled == pytest.approx(0.25 * labels_only + 0.75 * term, rel=1e-5)
    assert loss(live, alpha=1.0) == pytest.approx(labels_only, rel=1e-5)
    half = loss(live, alpha=0.25, prediction_weight=0.5)
    assert half == pytest.approx(0.25 * labels_only + 0.75 * 0.5 * term, rel=1e-5)


def test_compaction_agrees_with_masking_the_other_features_out(texts):
    pair, _, batch = texts
    pair.predictor.operator = "compact"
    mask = pair.select(batch.inputs).mask[batch.indices.argsort()]
    try:
        found = [
            CompactObjective(toy_config(), pair, CPU, 7, None, given)(batch)["loss"].item() for given in (mask, None)
        ]
        masked = losses.prediction_loss(pair.class_logits(batch.inputs, mask[batch.indices]), batch.labels).item()
    finally:
        pair.predictor.operator = "zero"
    assert found == pytest.approx([masked, masked], abs=1e-5)


def test_class_weights_reach_the_cross_entropy_of_every_stage(monkeypatch):
    pair, train, dev = toy_texts(examples=64)
    train.labels = dev.labels = (np.arange(64) % 4 == 0).astype(np.int64)
    seen, plain = [], losses.prediction_loss

    def watched(class_logits, labels, weights=None):
        expected = torch.where(labels == 1, 2.0, 2 / 3)  # 64 / (2 * 16), 64 / (2 * 48)
        seen.append(weights is not None and torch.allclose(weights, expected))
        return plain(class_logits, labels, weights)

    monkeypatch.setattr(losses, "prediction_loss", watched)
    stages = {"classifier_epochs": 0.5, "rationale_epochs": 0.5, "compact_epochs": 0.5}
    fit(toy_config(data={"class_weights": "balanced"}, stages=stages), pair, train, dev)
    assert len(seen) >= 4 and all(seen), "classifier, the selector's own, rationale, compact"
