"""Noise that is keyed by example and step; formulas by hand, and against the authors' code (tests/golden/ORIGIN.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from toys import toy_config

from rekd_train.models.base import relaxed_log_choice
from rekd_train.training import losses
from rekd_train.training.losses import gumbel, key, refreshed_step, uniform, uniform_scalar
from rekd_train.training.objectives import RationaleObjective
from rekd_train.training.runtime import Batch, Runtime, example_weights

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


def test_hard_labels_have_a_gradient_where_the_student_is_wrong():
    logits = torch.randn(4, 7, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    opposite, selectable = logits[..., 1] <= logits[..., 0], torch.ones(4, 7, dtype=torch.bool)
    losses.hard_rationale_distillation(opposite, relaxed_log_choice(logits, 0.1, None), selectable).backward()
    assert (logits.grad.abs().sum(dim=-1) > 0).all(), "every wrong choice is corrected"


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
DISTILLATION = {"alpha": 0.5, "noise": "independent", "rationale_temperature": None, "teacher_mask": "student"}


class Scripted(torch.nn.Module):
    """A pair, selector, predictor and teacher in one whose outputs are given."""

    def __init__(self, selector_logits, class_logits) -> None:
        super().__init__()
        self._given = torch.tensor(selector_logits), torch.tensor(class_logits)
        self.positions, self.seen = self._given[0].shape[1], None

    selector = predictor = backbone = preprocessor = property(lambda self: self)
    known_tokens = known_classes = marks = lambda self, batch, positions=None: None

    def __call__(self, inputs, mask=None, selectable=None):
        return self._given[0] if mask is None else self._given[1]

    def selectable(self, inputs):
        return torch.ones(self._given[0].shape[:2], dtype=torch.bool)

    def selector_logits(self, batch, positions):
        return self._given[0]

    def class_logits_on(self, batch, mask):
        self.seen = mask
        return self._given[1]


@pytest.mark.parametrize("case", CASES, ids=[f"T={case['T']}" for case in CASES])
def test_the_paper_s_configuration_gives_the_authors_losses(case, monkeypatch):
    noise = [torch.tensor(case[f"{role}_uniform"]) for role in ("student", "teacher")]

    def recorded(stream, examples, width):
        return -torch.log(-torch.log(noise[stream] + 1e-20) + 1e-20)

    monkeypatch.setattr("rekd_train.training.objectives.gumbel", recorded)
    monkeypatch.setattr(RationaleObjective, "stream", lambda self, purpose, step: purpose)
    config = toy_config(
        selection={**SELECTION, "target": case["target_sparsity"], "weight": case["select_lambda"]},
        distillation={**DISTILLATION, "rationale_weight": case["kd_r_lambda"]},
        temperature={"start": case["T"], "end": case["T"]},
    )
    student, teacher = (
        Scripted(case[f"{role}_selector_logits"], case[f"{role}_class_logits"]) for role in ("student", "teacher")
    )
    batch = Batch(torch.arange(3), {}, torch.tensor(case["labels"]), step=5, steps=10, examples=3, present=3)
    figures = RationaleObjective(config, student, Runtime("cpu"), 0, teacher)(batch)
    expected = {
        "loss": case["rekd_loss_alpha_0_5"], "extraction": case["re_loss"], "rationale": case["kd_rationale"],
        "prediction": case["kd_prediction"] * case["T"] ** 2, "penalty": case["select_lambda"] * case["select_cost"],
        "kept": case["selected"] * 3,
    }  # fmt: skip
    assert {name: float(figures[name]) for name in expected} == approx(expected, rel=1e-6)
    assert torch.equal(teacher.seen, torch.tensor(case["student_mask"])), "the teacher reads the student's mask"


def test_the_temperature_changes_in_the_authors_steps():
    # their step k = 1, 2, ...: if k % 100 == 0: tau = tau(k)
    assert [refreshed_step(step, 100) for step in range(350)] == [k // 100 * 100 for k in range(1, 351)]
    assert [refreshed_step(step, 1) for step in range(4)] == [0, 1, 2, 3]
