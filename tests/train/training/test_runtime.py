"""Devices and precision, as far as they can be told without the device; batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import toy_config, toy_texts

from rekd_train.errors import ConfigError
from rekd_train.training import losses
from rekd_train.training.runtime import Batches, Runtime, example_weights
from rekd_train.training.stages import fit


def test_batches_go_to_the_device_whatever_it_is():
    array = np.arange(6).reshape(2, 3)
    assert Runtime("meta").to_device(array).device.type == "meta"
    assert torch.equal(Runtime("cpu").to_device(array), torch.arange(6).reshape(2, 3))


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ConfigError, match=f"there is no device '{device}' here"):
        Runtime(device)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_chosen_only_where_the_gpu_computes_in_it(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    runtime = Runtime("cpu")
    assert [runtime.autocast(precision) for precision in ("auto", "bf16", "fp32")] == [False, True, False]
    runtime.device = torch.device("cuda")
    assert [runtime.autocast(precision) for precision in ("auto", "bf16", "fp32")] == [native, True, False]


def test_training_needs_no_float64_on_the_device(monkeypatch):
    """Apple's GPUs have none."""

    def absent(tensor):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    monkeypatch.setattr(torch.Tensor, "double", absent)
    stages = {"classifier_epochs": 0.5, "rationale_epochs": 1, "compact_epochs": 0.5, "evaluate_every": 0.25}
    fit(toy_config(stages=stages), *toy_texts(examples=64))


def test_batches_of_similar_length_hold_less_padding():
    _, train, _ = toy_texts(examples=600)
    computed = {}
    for buckets in (True, False):
        config = toy_config(optimisation={"batch_size": 20}, acceleration={"length_buckets": buckets})
        batches = list(Batches(config, train, 30, 1, Runtime("cpu")).starting_at(0))
        assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(600))
        computed[buckets] = sum(batch.inputs["input_ids"].numel() for batch in batches)
    assert computed[True] < 0.9 * computed[False]


def test_balanced_classes_count_alike_whoever_computes_which_part():
    labels = np.array([0, 0, 0, 0, 0, 2])
    weights = example_weights(labels, "balanced")
    assert weights.tolist() == pytest.approx([0.6] * 5 + [3.0]), "n / (classes that occur * examples of the class)"
    assert example_weights(labels, "none") is None
    given = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), *map(torch.from_numpy, (labels, weights))
    each = torch.nn.functional.cross_entropy(*given[:2], reduction="none")
    whole = losses.prediction_loss(*given)
    assert float(whole) == pytest.approx(float(each[:5].mean() + each[5]) / 2)
    parts = [losses.prediction_loss(*(value[part] for value in given)) for part in (slice(0, 4), slice(4, 6))]
    assert float(whole) == pytest.approx(float(parts[0] * 4 / 6 + parts[1] * 2 / 6))
