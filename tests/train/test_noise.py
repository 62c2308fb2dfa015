"""Draws keyed by example and step."""

import pytest
import torch

from rekd_train.training.noise import gumbel, key, uniform, uniform_scalar


def test_a_draw_belongs_to_its_example_and_position_not_to_the_batch():
    examples = torch.tensor([5, 1000, 3, 77])
    whole = uniform(key(1, 2, 3), examples, 9, 2)
    parts = torch.cat([uniform(key(1, 2, 3), examples[:1], 9, 2), uniform(key(1, 2, 3), examples[1:], 9, 2)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[:, :4], uniform(key(1, 2, 3), examples, 4, 2)), "a wider batch draws the same"


def test_keys_examples_and_places_give_different_draws():
    examples = torch.arange(50)
    one, other = uniform(key(1, 2, 3), examples, 40), uniform(key(1, 2, 4), examples, 40)
    assert not (one == other).any()
    assert len(one.unique()) > 0.99 * one.numel()
    assert key(1, 2) != key(2, 1) and key(1) != key(1, 0)


def test_draws_are_uniform_and_uncorrelated():
    draws = uniform(key(7, 0), torch.arange(2000), 100).double()
    assert draws.min() > 0 and draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.003)
    assert draws.var().item() == pytest.approx(1 / 12, abs=0.001)
    counts = torch.histc(draws.float(), bins=20, min=0, max=1) / draws.numel()
    assert (counts - 0.05).abs().max() < 0.002
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert abs(((a - 0.5) * (b - 0.5)).mean().item() * 12) < 0.01


def test_gumbel_noise_selects_with_the_probability_of_the_logits():
    noise = gumbel(key(3), torch.arange(20_000), 1)[:, 0]
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02), "Euler's constant"
    assert noise.var().item() == pytest.approx(1.6449, abs=0.06), "pi^2 / 6"
    logits = torch.tensor([0.0, 1.0])
    chosen = ((logits + noise).argmax(dim=1) == 1).double().mean().item()
    assert chosen == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.01)


def test_the_host_draws_like_the_tensors():
    draws = [uniform_scalar(key(9, step)) for step in range(2000)]
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02) and min(draws) > 0 and max(draws) < 1
