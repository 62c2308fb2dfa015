"""Devices and precision, as far as they can be told without the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import toy_config, toy_texts

from rekd_train.training.runtime import Runtime
from rekd_train.training.stages import fit


def test_batches_go_to_the_device_whatever_it_is():
    array = np.arange(6).reshape(2, 3)
    assert Runtime("meta").to_device(array).device.type == "meta"
    assert torch.equal(Runtime("cpu").to_device(array), torch.arange(6).reshape(2, 3))


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_chosen_only_where_the_gpu_computes_in_it(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    runtime = Runtime("cpu")
    runtime.device = torch.device("cuda")
    assert runtime.autocast("auto") is native
    assert runtime.autocast("bf16") is True and runtime.autocast("fp32") is False


def test_training_needs_no_float64_on_the_device(monkeypatch):
    """Apple's GPUs have none."""

    def absent(tensor):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    monkeypatch.setattr(torch.Tensor, "double", absent)
    stages = {"classifier_epochs": 0.5, "rationale_epochs": 1, "compact_epochs": 0.5, "evaluate_every": 0.25}
    fit(toy_config(stages=stages), *toy_texts(examples=64))
