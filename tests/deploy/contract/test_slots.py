"""K follows the padded length: never too few slots for a rationale, and few for short texts."""

import numpy as np
import pytest

from rekd_deploy.contract.signature import SLOTS, Slots, text_pair_signature
from rekd_deploy.repository.manifest import signature_from_dict, signature_to_dict
from rekd_train.inputs.policy import SelectionPolicy

LONGEST = 300


@pytest.mark.parametrize("minimum", [0, 1, 7])
@pytest.mark.parametrize("budget", [None, 0.001, 0.1, 0.15, 0.25, 1 / 3, 0.999999, 1.0])
def test_no_rationale_of_a_length_has_more_than_its_slots(budget, minimum):
    policy = SelectionPolicy(budget=budget, minimum=minimum)
    slots, limits = Slots.of(policy, policy.capacity(LONGEST - 2)), policy.limits(np.arange(LONGEST + 1))
    for length in range(3, LONGEST + 1):
        assert limits[: length - 1].max() <= slots.at(length) <= slots.most  # [CLS] and [SEP] are not chosen
        assert slots.at(length) <= max(policy.capacity(length), policy.minimum)
    assert slots.at(LONGEST) == slots.most


def test_the_manifest_carries_the_rule_and_one_that_gives_every_length_the_same_is_a_fixed_axis():
    pair = text_pair_signature(Slots(150_000, 2, 38), 2)
    read = signature_from_dict(signature_to_dict(pair))
    assert read == pair and read.predictor.slots.at(64) == 9
    assert read.selector.sizes_at(read.handover[0], 128) == ("batch", 19)
    assert Slots(1000, 1, 1).axis == 1 and Slots(150_000, 1, 9).axis == SLOTS
    pair = text_pair_signature(Slots(1000, 1, 1), 2)
    assert pair.predictor.slots is None and pair.predictor.inputs[1].shape == ("batch", 1)
