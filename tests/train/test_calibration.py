"""The fitted rule meets its target and lies away from ties."""

from __future__ import annotations

import pytest
import torch

from rekd_train.inputs.policy import SelectionPolicy, cut_margins
from rekd_train.models.gates import apply_policy
from rekd_train.training.calibration import calibrate_bias

RULE = SelectionPolicy(bias=0.0, budget=0.5, minimum=1)


@pytest.fixture
def readings():
    """(scores, selectable): (40, 12) with rows of 6 to 12 features."""
    scores = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    return scores, torch.arange(12) < 6 + torch.arange(40)[:, None] % 7


@pytest.mark.parametrize("target", [0.2, 0.3])
def test_the_bias_meets_the_target_and_lies_midway_between_two_scores(readings, target):
    scores, selectable = readings
    rule = RULE.model_copy(update={"bias": calibrate_bias(scores, selectable, RULE, 6, target)})
    mask = apply_policy(scores, selectable, rule, 6)
    rate = (mask.sum(dim=1) / selectable.sum(dim=1)).mean().item()
    assert target <= rate < target + 1 / selectable.sum(dim=1).min() / 40
    cut = -rule.bias
    above, below = scores[selectable & (scores > cut)].min(), scores[selectable & (scores < cut)].max()
    assert cut == pytest.approx(((above + below) / 2).item(), abs=2e-6)
    near = torch.from_numpy(cut_margins(scores.numpy(), selectable.numpy(), rule)) < (above - below).item() / 4
    noise = (torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * (above - below) / 4
    changed = apply_policy(scores + noise, selectable, rule, 6) != mask
    assert not (changed & ~near).any()


def test_a_target_that_the_budget_forbids_gives_the_largest_useful_bias(readings):
    scores, selectable = readings
    bias = calibrate_bias(scores, selectable, RULE, 6, 0.9)
    assert bias == pytest.approx(-scores[selectable].min().item(), abs=1e-6)
