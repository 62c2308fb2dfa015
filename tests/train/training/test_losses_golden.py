"""The paper's configuration against the authors' code (tests/golden/ORIGIN.md says how each figure is made)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toys import toy_config

from rekd_train.training.losses import refreshed_step
from rekd_train.training.objectives import RationaleObjective
from rekd_train.training.runtime import Batch, Runtime

CASES = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())
SELECTION = {"penalty_per": "batch", "penalty_on": "counts", "denominator": "all", "selectable": "all", "budget": None}
DISTILLATION = {"alpha": 0.5, "noise": "independent", "rationale_temperature": None, "teacher_mask": "student"}


class Scripted(torch.nn.Module):
    """A pair, selector, predictor and teacher in one whose outputs are given."""

    def __init__(self, selector_logits, class_logits) -> None:
        super().__init__()
        self._given = torch.tensor(selector_logits), torch.tensor(class_logits)
        self.seen = None

    selector = predictor = backbone = preprocessor = property(lambda self: self)

    @property
    def positions(self):
        return self._given[0].shape[1]

    def __call__(self, inputs, mask=None, selectable=None):
        return self._given[0] if mask is None else self._given[1]

    def selectable(self, inputs):
        return torch.ones(self._given[0].shape[:2], dtype=torch.bool)

    def known_tokens(self, batch, positions=None):
        """All of them; it is asked for neither classes that it does not know nor marks."""

    known_classes = marks = known_tokens

    def selector_logits(self, batch, positions):
        return self._given[0]

    def class_logits_on(self, batch, mask):
        self.seen = mask
        return self._given[1]


@pytest.mark.parametrize("case", CASES, ids=[f"T={case['T']}" for case in CASES])
def test_the_paper_s_configuration_gives_the_authors_losses(case, monkeypatch):
    noise = {0: case["student_uniform"], 1: case["teacher_uniform"]}

    def recorded(stream, examples, width):
        return -torch.log(-torch.log(torch.tensor(noise[stream]) + 1e-20) + 1e-20)

    monkeypatch.setattr("rekd_train.training.objectives.gumbel", recorded)
    monkeypatch.setattr(RationaleObjective, "stream", lambda self, purpose, step: purpose)
    config = toy_config(
        selection={**SELECTION, "target": case["target_sparsity"], "weight": case["select_lambda"]},
        distillation={**DISTILLATION, "rationale_weight": case["kd_r_lambda"]},
        temperature={"start": case["T"], "end": case["T"]},
    )
    student = Scripted(case["student_selector_logits"], case["student_class_logits"])
    teacher = Scripted(case["teacher_selector_logits"], case["teacher_class_logits"])
    batch = Batch(torch.arange(3), {}, torch.tensor(case["labels"]), step=5, steps=10, examples=3, present=3)
    figures = RationaleObjective(config, student, Runtime("cpu"), 0, teacher)(batch)
    expected = {
        "loss": case["rekd_loss_alpha_0_5"], "extraction": case["re_loss"], "rationale": case["kd_rationale"],
        "prediction": case["kd_prediction"] * case["T"] ** 2, "penalty": case["select_lambda"] * case["select_cost"],
        "kept": case["selected"] * 3,
    }  # fmt: skip
    assert {name: float(figures[name]) for name in expected} == pytest.approx(expected, rel=1e-6)
    assert torch.equal(teacher.seen, torch.tensor(case["student_mask"])), "the teacher reads the student's mask"


def test_the_temperature_changes_in_the_authors_steps():
    # their step k = 1, 2, ...: if k % 100 == 0: tau = tau(k)
    assert [refreshed_step(step, 100) for step in range(350)] == [k // 100 * 100 for k in range(1, 351)]
    assert [refreshed_step(step, 1) for step in range(4)] == [0, 1, 2, 3]
