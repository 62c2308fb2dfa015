"""Each acceleration does something, and switched off it does not."""

from __future__ import annotations

import pytest
import torch
from toys import toy_config, toy_images, toy_texts

from rekd_train.training.batches import all_batches, uniform_scalar
from rekd_train.training.objectives import ClassifierObjective, CompactObjective
from rekd_train.training.runtime import Runtime
from rekd_train.training.teacher import teacher_for

CPU = Runtime("cpu")


@pytest.mark.parametrize("augmented", [True, False])
def test_a_teacher_is_remembered_where_its_inputs_stay_the_same(augmented):
    pair, train, _ = toy_images(examples=64, augmented=augmented)
    teacher = teacher_for(pair, train, toy_config(), CPU)
    assert teacher.remembers is not augmented


def test_compaction_computes_kept_features_alone(monkeypatch):
    pair, train, _ = toy_texts(examples=16)
    pair.predictor.operator = "compact"
    called = []
    for name in ("gathered", "attended"):
        own = getattr(pair.predictor.backbone, name)
        monkeypatch.setattr(
            pair.predictor.backbone, name, lambda *inputs, own=own, name=name: (called.append(name), own(*inputs))[1]
        )
    CompactObjective(toy_config(), pair, CPU, 7, None, None)(next(all_batches(train, CPU)))
    assert called == ["gathered"]


def test_products_run_in_the_precision_that_is_set():
    for precision, kind in (("fp32", torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16)):
        with CPU.autocast(precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


@pytest.mark.parametrize(("share", "masked"), [(0.0, 0), (1.0, 12), (0.5, None)])
def test_a_share_of_the_classifier_s_batches_is_masked(share, masked):
    pair, train, _ = toy_texts(examples=32)
    batch = next(all_batches(train, CPU))
    kept = []
    objective = ClassifierObjective(toy_config(stages={"masked_share": share}), pair, pair.predictor, CPU, 7, None)
    objective.predictor = torch.nn.Module()
    objective.predictor.forward = lambda inputs, keep, selectable: (
        kept.append((keep.sum() / selectable.sum()).item()), torch.zeros(len(keep), 2)
    )[1]  # fmt: skip
    for step in range(12):
        batch.step = step
        objective(batch)
    found = sum(rate < 1 for rate in kept)
    if masked is None:
        masked = sum(uniform_scalar(objective.stream(0, step)) < share for step in range(12))
        assert 0 < masked < 12
    assert found == masked and min(kept) > 0.15
