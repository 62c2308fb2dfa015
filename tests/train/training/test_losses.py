"""Noise that is keyed by example and step, and the formulas that no golden figure has."""

import pytest
import torch

from rekd_train.models.gates import relaxed_log_choice
from rekd_train.training import losses
from rekd_train.training.losses import gumbel, key, uniform, uniform_scalar


def test_a_draw_belongs_to_its_example_and_position_not_to_the_batch():
    examples = torch.tensor([5, 1000, 3, 77])
    whole = gumbel(key(1, 2, 3), examples, 9)
    parts = torch.cat([gumbel(key(1, 2, 3), examples[:1], 9), gumbel(key(1, 2, 3), examples[1:], 9)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[:, :4], gumbel(key(1, 2, 3), examples, 4)), "a wider batch draws the same"
    first = uniform(key(1, 2, 3), examples, 18)[0, 0].item()
    assert first == pytest.approx(0.46558219, abs=1e-7), "as in every run before"


def test_draws_are_uniform_and_uncorrelated():
    draws = uniform(key(7, 0), torch.arange(2000), 100).double()
    assert draws.min() > 0 and draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.003)
    counts = torch.histc(draws.float(), bins=20, min=0, max=1) / draws.numel()
    assert (counts - 0.05).abs().max() < 0.002
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert abs(((a - 0.5) * (b - 0.5)).mean().item() * 12) < 0.01
    host = [uniform_scalar(key(9, step)) for step in range(2000)]
    assert sum(host) / len(host) == pytest.approx(0.5, abs=0.02) and min(host) > 0 and max(host) < 1


def test_gumbel_noise_selects_with_the_probability_of_the_logits():
    noise = gumbel(key(3), torch.arange(20_000), 1)[:, 0]
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02), "Euler's constant"
    chosen = ((torch.tensor([0.0, 1.0]) + noise).argmax(dim=1) == 1).double().mean().item()
    assert chosen == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.01)


LINE = [[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
GRID = [[1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0, 1]]  # a block of 2 x 2 in a corner; a chess board


@pytest.mark.parametrize(
    ("mask", "real", "columns", "borders"),
    [
        (LINE, 6, None, (3 / 6 + 0) / 2),
        (LINE, 4, None, (1 / 4 + 0) / 2),  # the last kept one is padding, and the border to it is no border
        (GRID, 9, 3, (4 / 9 + 12 / 9) / 2),
        (GRID, 9, None, (3 / 9 + 8 / 9) / 2),  # read as a line
    ],
)
def test_discontinuity_counts_neighbours_that_differ(mask, real, columns, borders):
    mask = torch.tensor(mask, dtype=torch.float32)
    selectable = (torch.arange(mask.shape[1]) < real).expand(mask.shape)
    assert losses.discontinuity(mask, selectable, columns).item() == pytest.approx(borders)


def test_hard_labels_have_a_gradient_where_the_student_is_wrong():
    logits = torch.randn(4, 7, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    opposite, selectable = logits[..., 1] <= logits[..., 0], torch.ones(4, 7, dtype=torch.bool)
    losses.hard_rationale_distillation(opposite, relaxed_log_choice(logits, 0.1, None), selectable).backward()
    assert (logits.grad.abs().sum(dim=-1) > 0).all(), "every wrong choice is corrected"
