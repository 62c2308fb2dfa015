"""Tests share a graph only if it is the very one that they would have traced."""

from __future__ import annotations

import copy

import numpy as np
import torch
from conftest import make_rationalizer
from traced_once import TracedOnce, content

from rekd_deploy.graphs import tracing


def test_what_a_graph_follows_from_is_told_apart():
    pair, arguments = make_rationalizer(), ("selector", 48)
    other_weight, other_rule = copy.deepcopy(pair), copy.deepcopy(pair)
    with torch.no_grad():
        next(other_weight.parameters()).view(-1)[0] += 1e-3
    other_rule.policy = pair.policy.model_copy(update={"bias": 0.123})
    pairs = [pair, other_weight, other_rule, copy.deepcopy(pair).half()]
    for value in (np.zeros(2000), np.eye(1, 2000, 1000)[0], torch.zeros(2000), torch.zeros(50, 40)):
        pairs.append(copy.deepcopy(pair))
        pairs[-1].attribute = value
    digests = [content(each, arguments, {}) for each in pairs]
    digests += [content(pair, ("selector", 64), {}), content(pair, arguments, {"fused": True})]
    assert len(set(digests)) == len(digests)
    assert content(make_rationalizer(), arguments, {}) == digests[0], "an equal one has the same"


def test_graphs_are_shared_unless_they_are_to_be_fresh(request):
    assert isinstance(tracing.onnx_from_module, TracedOnce)
    request.getfixturevalue("fresh_graphs")
    assert not isinstance(tracing.onnx_from_module, TracedOnce)
