"""The decision, as ONNX Runtime takes it; the gate compares the whole of it with every pair that is exported."""

import numpy as np
import pytest
import torch
from conftest import make_rationalizer
from torch import nn

from rekd_deploy.contract.signature import BATCH, LENGTH, GraphSignature, TensorSpec
from rekd_deploy.graphs.tracing import onnx_from_module
from rekd_deploy.parity.examples import constructed_scores
from rekd_deploy.parity.gate import wrong_handovers
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, mask_by_specification
from rekd_train.models.base import apply_policy, kept_positions

POLICIES = {
    "threshold, budget, minimum": SelectionPolicy(bias=0.1, budget=0.25, minimum=1),
    "fill the budget": SelectionPolicy(bias=None, budget=0.3, minimum=0),
    "threshold alone": SelectionPolicy(bias=-0.5, budget=None, minimum=0),
    "minimum above budget": SelectionPolicy(bias=-5.0, budget=0.05, minimum=4),
    "paper": PAPER_POLICY,
}


def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_a_rule_that_keeps_every_position_shows_cls_once_and_has_a_slot_for_each():
    rationalizer = make_rationalizer(policy=PAPER_POLICY)
    special = rationalizer.preprocessor.special_ids
    inputs = tensors(rationalizer.preprocessor.pad([[special["cls"], *range(10, 56), special["sep"]]], 48))
    everything = torch.ones(1, 48, dtype=torch.bool)
    with torch.inference_mode():
        logits = rationalizer.gathered_class_logits(inputs, everything)
        expected = rationalizer.class_logits(inputs, everything)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


class _Decision(nn.Module):
    def __init__(self, policy: SelectionPolicy, capacity: int) -> None:
        super().__init__()
        self.policy, self.capacity = policy, capacity

    def forward(self, *tensors):
        mask = apply_policy(*tensors, self.policy, self.capacity)
        return mask, *kept_positions(mask, self.capacity)


def decide_in_onnx(policy: SelectionPolicy, capacity: int):
    """The decision exported on its own, as a function of scores and selectable positions."""
    text, slots = (BATCH, LENGTH), (BATCH, capacity)
    signature = GraphSignature(
        (TensorSpec("scores", "float32", text), TensorSpec("selectable", "bool", text)),
        (TensorSpec("mask", "bool", text), TensorSpec("positions", "int64", slots), TensorSpec("kept", "bool", slots)),
    )
    model = onnx_from_module(_Decision(policy, capacity), signature, "decision", longest=64)
    return OnnxRuntimeRunner(model.SerializeToString(), signature, "decision")


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_exported_decision_is_the_specification_on_ties_and_steps(policy):
    rationalizer = make_rationalizer(policy=policy)
    with decide_in_onnx(policy, rationalizer.capacity) as decision:
        for arrays in constructed_scores(rationalizer.preprocessor, policy, rationalizer.capacity):
            selectable = rationalizer.selectable(tensors(arrays)).numpy()
            chosen = decision.run({"scores": arrays["scores"], "selectable": selectable})
            np.testing.assert_array_equal(chosen["mask"], mask_by_specification(arrays["scores"], selectable, policy))
            assert not wrong_handovers(chosen)


def test_exported_budget_is_counted_in_integers():
    """41 x 0.902439 is just below 37; the exporter writes a division of integers in float32, where it is 37."""
    policy = SelectionPolicy(bias=None, budget=0.902439, minimum=0)
    with decide_in_onnx(policy, 41) as decision:
        chosen = decision.run({"scores": np.zeros((1, 41), np.float32), "selectable": np.ones((1, 41), bool)})
    assert chosen["mask"].sum() == policy.limits(np.array([41]))[0] == 36
