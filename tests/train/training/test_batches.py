"""Batches, and draws keyed by example and step."""

import numpy as np
import pytest
import torch
from toys import toy_texts

from rekd_train.training import losses
from rekd_train.training.batches import Batches, example_weights, gumbel, key, uniform, uniform_scalar
from rekd_train.training.runtime import Runtime


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


def test_batches_of_similar_length_hold_less_padding():
    _, train, _ = toy_texts(examples=600)
    computed = {}
    for buckets in (True, False):
        batches = list(Batches(train, 20, 30, 1, buckets, Runtime("cpu")).starting_at(0))
        assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(600))
        computed[buckets] = sum(batch.inputs["input_ids"].numel() for batch in batches)
    assert computed[True] < 0.9 * computed[False]


def test_balanced_classes_count_alike_whoever_computes_which_part():
    labels = np.array([0, 0, 0, 0, 0, 2])
    weights = example_weights(labels, "balanced")
    assert weights.tolist() == pytest.approx([0.6] * 5 + [3.0]), "n / (classes that occur * examples of the class)"
    assert example_weights(labels, "none") is None
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
    whole = losses.prediction_loss(logits, torch.from_numpy(labels), torch.from_numpy(weights))
    assert float(whole) == pytest.approx(float(each[:5].mean() + each[5]) / 2)
    parts = [
        losses.prediction_loss(logits[part], torch.from_numpy(labels[part]), torch.from_numpy(weights[part]))
        for part in (slice(0, 4), slice(4, 6))
    ]
    assert float(whole) == pytest.approx(float(parts[0] * 4 / 6 + parts[1] * 2 / 6))
