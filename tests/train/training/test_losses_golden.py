"""The losses and the noisy mask against the authors' code (tests/golden/ORIGIN.md says how each figure is made)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rekd_train.models.gates import relaxed_log_choice, straight_through_gate
from rekd_train.training.losses import batch_penalty, prediction_distillation, prediction_loss, rationale_distillation

CASES = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())


def gumbel(uniform: list) -> torch.Tensor:
    return -torch.log(-torch.log(torch.tensor(uniform) + 1e-20) + 1e-20)


@pytest.mark.parametrize("case", CASES, ids=[f"T={case['T']}" for case in CASES])
def test_losses_are_the_authors(case: dict) -> None:
    temperature, features = case["T"], case["total_features"]
    student = straight_through_gate(
        torch.tensor(case["student_selector_logits"]), temperature, gumbel(case["student_uniform"])
    )
    teacher = relaxed_log_choice(
        torch.tensor(case["teacher_selector_logits"]), temperature, gumbel(case["teacher_uniform"])
    )
    everywhere = torch.ones(student.mask.shape, dtype=torch.bool)
    assert torch.equal(student.mask, torch.tensor(case["student_mask"]))
    assert student.mask.sum(dim=1).mean().item() == pytest.approx(case["selected"], rel=1e-6)

    kept, everything = student.mask.sum(), torch.tensor(float(everywhere.sum()))
    penalty = batch_penalty(kept, everything, case["target_sparsity"]) * features**2
    rationale = rationale_distillation(teacher, student.log_soft, everywhere)
    class_logits = torch.tensor(case["teacher_class_logits"]), torch.tensor(case["student_class_logits"])
    prediction = prediction_distillation(*class_logits, temperature)
    cross_entropy = prediction_loss(class_logits[1], torch.tensor(case["labels"]))
    extraction = cross_entropy + case["select_lambda"] * penalty
    whole = 0.5 * extraction + 0.5 * (case["kd_r_lambda"] * rationale + prediction)
    for value, key in (
        (penalty, "select_cost"),
        (rationale, "kd_rationale"),
        (prediction / temperature**2, "kd_prediction"),
        (cross_entropy, "cross_entropy"),
        (extraction, "re_loss"),
        (whole, "rekd_loss_alpha_0_5"),
    ):
        assert value.item() == pytest.approx(case[key], rel=1e-6), key
