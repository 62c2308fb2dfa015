"""[CLS] alone in the last block equals the whole last block."""

from __future__ import annotations

import pytest
import torch
from conftest import make_rationalizer


@pytest.fixture
def backbone():
    return make_rationalizer().predictor.backbone


def states(backbone, positions: bool):
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(3, 7, backbone.settings.width, generator=generator, requires_grad=True)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    places = torch.tensor([[0, 3, 5, 6, 9, 11, 20]] * 3) if positions else None
    return content, mask, places


@pytest.mark.parametrize("positions", [False, True])
def test_equals_the_whole_encoder(backbone, positions):
    content, mask, places = states(backbone, positions)
    whole = backbone._encode(content, mask, places)[:, 0]
    first = backbone._first(content, mask, places)
    torch.testing.assert_close(first, whole, rtol=0, atol=1e-6)


def test_the_gradients_are_equal(backbone):
    content, mask, places = states(backbone, positions=True)
    gradients = []
    for run in (lambda: backbone._encode(content, mask, places)[:, 0], lambda: backbone._first(content, mask, places)):
        parameters = [content, *(p for n, p in backbone.named_parameters() if "word_embeddings" not in n)]
        gradients.append(torch.autograd.grad(run().square().sum(), parameters))
    for whole, first in zip(*gradients, strict=True):
        torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-5)


def test_it_does_less_work(backbone):
    """The last block's feed-forward sees one position."""
    seen = []
    last = backbone.model.encoder.layer[-1]
    handle = last.intermediate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    content, mask, places = states(backbone, positions=False)
    backbone._first(content, mask, places)
    handle.remove()
    assert seen == [1]
