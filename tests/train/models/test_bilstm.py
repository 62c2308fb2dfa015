"""The BiLSTM family: padding without influence, and which identities it keeps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_bilstm
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rekd_train.checkpoints.checkpoint import load, save
from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError
from rekd_train.models.families import build_backbone
from rekd_train.models.gates import kept_positions
from rekd_train.models.rationalizer import Rationalizer

Inputs = dict[str, torch.Tensor]


make = partial(make_bilstm, max_length=40, lengths=(16, 24))


@pytest.fixture(scope="module")
def model() -> Rationalizer:
    return make()


@pytest.fixture(scope="module")
def inputs(model: Rationalizer) -> Inputs:
    long = "I think the story is dull, and the actor was awful. But the end is wonderful"
    texts = ["the film was great", "bad", long]
    return {name: torch.from_numpy(array) for name, array in model.preprocessor(texts).inputs.items()}


@torch.inference_mode()
def test_states_are_those_of_a_packed_bidirectional_lstm(model: Rationalizer, inputs: Inputs) -> None:
    backbone = model.predictor.backbone
    reference = nn.LSTM(12, 6, num_layers=2, bidirectional=True, batch_first=True)
    for layer in range(2):
        for suffix, own in (("", backbone.onward[layer]), ("_reverse", backbone.backward[layer])):
            for name, weights in own.named_parameters():
                getattr(reference, name.replace("_l0", f"_l{layer}") + suffix).copy_(weights)
    lengths = inputs["attention_mask"].sum(dim=1)
    packed = pack_padded_sequence(backbone.words(inputs["input_ids"]), lengths, batch_first=True, enforce_sorted=False)
    states, (last, _) = reference(packed)
    expected, _ = pad_packed_sequence(states, batch_first=True)
    real = backbone.real(inputs)
    torch.testing.assert_close(backbone.states(inputs)[real], expected[real[:, : expected.shape[1]]], atol=1e-6, rtol=0)
    pooled = backbone.zeroed(inputs, torch.ones_like(inputs["attention_mask"], dtype=torch.float32))
    torch.testing.assert_close(pooled, torch.cat([last[-2], last[-1]], dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("operator", ["zero", "compact"])
@torch.inference_mode()
def test_padding_changes_nothing(operator: str, inputs: Inputs) -> None:
    model = make(operator)
    wide = {name: nn.functional.pad(tensor, (0, 16)) for name, tensor in inputs.items()}
    narrow, broad = model.select(inputs), model.select(wide)
    real = inputs["attention_mask"] > 0
    torch.testing.assert_close(narrow.scores[real], broad.scores[:, : real.shape[1]][real], atol=1e-6, rtol=0)
    assert torch.equal(narrow.mask, broad.mask[:, : real.shape[1]])
    wide["input_ids"] = torch.where(wide["attention_mask"] > 0, wide["input_ids"], 9)  # what the padding is
    same = model.class_logits(wide, broad.mask)
    torch.testing.assert_close(model.class_logits(inputs, narrow.mask), same, atol=1e-6, rtol=0)


@pytest.mark.parametrize("operator", ["zero", "compact"])
@torch.inference_mode()
def test_dropped_words_change_nothing(operator: str, inputs: Inputs) -> None:
    model = make(operator)
    mask = model.select(inputs).mask
    dropped = model.selectable(inputs) & ~mask
    other = dict(inputs, input_ids=torch.where(dropped, inputs["input_ids"] % 7 + 20, inputs["input_ids"]))
    assert mask.any() and not torch.equal(other["input_ids"], inputs["input_ids"])
    assert torch.equal(model.class_logits(inputs, mask), model.class_logits(other, mask))
    assert torch.equal(model.gathered_class_logits(inputs, mask), model.gathered_class_logits(other, mask))
    assert not torch.allclose(model.class_logits(inputs), model.class_logits(other))


@torch.inference_mode()
def test_compact_is_gathered_but_gathering_is_not_masking(model: Rationalizer, inputs: Inputs) -> None:
    backbone = model.predictor.backbone
    mask = model.select(inputs).mask
    gathered = backbone.gathered(inputs, *kept_positions(mask, model.capacity))
    torch.testing.assert_close(backbone.attended(inputs, mask), gathered, atol=1e-6, rtol=0)
    assert not torch.allclose(backbone.zeroed(inputs, mask.float()), gathered, atol=1e-3)
    nothing = torch.zeros_like(mask)
    empty = backbone.gathered(inputs, *kept_positions(nothing, 4))
    torch.testing.assert_close(empty, empty[:1].expand_as(empty), atol=1e-6, rtol=0)


def test_learning_reaches_mask_and_embeddings(model: Rationalizer, inputs: Inputs) -> None:
    backbone = model.predictor.backbone
    keep = torch.full(inputs["input_ids"].shape, 0.6, requires_grad=True)
    backbone.zeroed(inputs, keep).square().sum().backward()
    real = backbone.real(inputs)
    assert (keep.grad[real] != 0).all() and (keep.grad[~real] == 0).all()
    assert backbone.table.weight.grad.abs().sum() > 0
    backbone.zero_grad()


def test_checkpoint_and_predictions(model: Rationalizer, texts: list[str], tmp_path: Path) -> None:
    answers = model.predict(texts)
    assert load(save(model, tmp_path / "bilstm")).predict(texts) == answers
    assert all(span.text for answer in answers for span in answer.rationale)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="even width"):
        build_backbone(BackboneConfig(family="bilstm", width=7, heads=1), {"pad": 0})
