"""Backbones of texts: what a probe of an encoder of transformers finds is true, and each keeps the contract."""

import pytest
import torch
from conftest import encoder_settings, make_bilstm, make_encoder_pair, make_rationalizer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rekd_train.checkpoints.checkpoint import load, save
from rekd_train.config.run import BackboneConfig
from rekd_train.config.sections import trusted_code
from rekd_train.errors import ConfigError
from rekd_train.models import text_encoder
from rekd_train.models.base import kept_positions
from rekd_train.models.families import build_backbone
from rekd_train.models.text_encoder import expanded, last_states

GATHERING = {"bert": "exact", "roberta": "exact", "xlm-roberta": "exact", "camembert": "exact", "electra": "exact",
             "distilbert": "exact", "albert": "exact", "ernie": "exact", "nomic_bert": "exact", "eurobert": "exact",
             "modernbert": "windowed", "mpnet": "packed", "deberta": "packed", "deberta-v2": "packed",
             "roformer": "packed"}  # fmt: skip
"""How each kind sees kept tokens alone, and so what its compact input means."""
OTHERS = ("bilstm", "own_backbone:Convolutions")
LENGTH = 150
"""Longer than a local window of ModernBERT's."""


def backbone_of(kind: str, **changes):
    torch.manual_seed(0)
    if kind not in OTHERS:
        return build_backbone(encoder_settings(kind, **changes), {"pad": 0, "cls": 2, "sep": 3}).eval()
    with trusted_code():
        settings = BackboneConfig(family=kind, layers=2, width=16, heads=1, vocabulary=100)
        backbone = build_backbone(settings, {"pad": 0, "cls": 2, "sep": 3}).eval()
    with torch.no_grad():  # random weights give states too alike to tell apart
        for weights in backbone.parameters():
            weights.mul_(4)
    return backbone


def some_inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Four texts of different lengths, and a tenth of their tokens to keep, of the last one none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 40, (4, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 100:], mask[2:, 15:] = 0, 0
    keep = (torch.rand(ids.shape, generator=generator) < 0.1) & (mask > 0)
    keep[:, 0] = keep[3] = False
    return {"input_ids": ids, "attention_mask": mask}, keep


@pytest.mark.parametrize("kind", [*GATHERING, *OTHERS])
@torch.no_grad()
def test_kept_tokens_give_what_masked_ones_give_and_padding_changes_no_answer(kind):
    backbone, (inputs, keep) = backbone_of(kind), some_inputs()
    assert kind in OTHERS or backbone.traits.gathering == GATHERING[kind]
    shown = keep.index_fill(1, torch.tensor([0]), True)
    other = inputs | {"input_ids": torch.where(shown, inputs["input_ids"], 7)}
    for pooling in ("start", "mean"):
        backbone.settings = backbone.settings.model_copy(update={"pooling": pooling})
        attended = backbone.attended(inputs, keep)
        gathered = backbone.gathered(inputs, *kept_positions(keep, 25))
        torch.testing.assert_close(gathered, attended, atol=1e-5, rtol=0)
        assert torch.equal(backbone.attended(other, keep), attended)
        assert torch.equal(backbone.gathered(other, *kept_positions(keep, 25)), gathered)
        assert not torch.allclose(backbone.zeroed(inputs, keep.float()), attended, atol=1e-3)
    backbone, (inputs, keep) = backbone_of(kind), some_inputs()
    short = {name: tensor[2:, :15].clone() for name, tensor in inputs.items()}
    inputs["input_ids"][inputs["attention_mask"] == 0] = 9  # what lies under the padding
    whole, alone = backbone.states(inputs)[2:, :15], backbone.states(short)
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)
    zeroed, alone = backbone.zeroed(inputs, keep.float())[2:], backbone.zeroed(short, keep[2:, :15].float())
    torch.testing.assert_close(zeroed, alone, atol=1e-5, rtol=0)
    attended, alone = backbone.attended(inputs, keep)[2:], backbone.attended(short, keep[2:, :15])
    torch.testing.assert_close(attended, alone, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_states_of_a_bilstm_are_those_of_a_packed_bidirectional_lstm(texts):
    pair = make_bilstm()
    backbone = pair.predictor.backbone
    inputs = {name: torch.from_numpy(array) for name, array in pair.preprocessor(texts).inputs.items()}
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
    pooled = backbone.zeroed(inputs, torch.ones_like(real, dtype=torch.float32))
    torch.testing.assert_close(pooled, torch.cat([last[-2], last[-1]], dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kind", "reason"), [
    ("mobilebert", "lets padding change its states"), ("convbert", "lets padding change its states"),
    ("gpt2", "reads in one direction only.*fix: a bidirectional encoder"),
    ("llama", "reads in one direction only"), ("t5", "does not run on embeddings alone"),
    ("ibert", "has no plain table of word embeddings"), ("clip", "no encoder|cannot be built|takes no|does not run"),
])  # fmt: skip
def test_encoders_that_cannot_be_a_backbone_are_refused_with_the_reason(kind, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        backbone_of(kind)
    assert kind in str(caught.value) and "\n" not in str(caught.value)


def test_the_probe_draws_nothing_and_is_recorded_with_the_architecture(tmp_path, monkeypatch, texts):
    draws = []
    for settings in (encoder_settings("roberta"), backbone_of("roberta").settings):
        torch.manual_seed(0)
        backbone = text_encoder.TextEncoder(settings, {"pad": 0})
        draws.append((torch.rand(3), backbone.table.weight.detach().clone()))
    for probed, recorded in zip(*draws, strict=True):
        assert torch.equal(probed, recorded)
    backbone = backbone_of("modernbert", layers=1, dropout=0.3, attention_dropout=0.2)
    assert len(backbone.model.layers) == 1
    assert (backbone.model.config.mlp_dropout, backbone.model.config.attention_dropout) == (0.3, 0.2)
    pair = make_encoder_pair("modernbert")
    directory = save(pair, tmp_path / "pair")
    monkeypatch.setattr(text_encoder, "probed", lambda config: pytest.fail("probed again"))
    loaded = load(directory)
    assert loaded.predictor.backbone.settings.architecture["model_type"] == "modernbert"
    assert loaded.predictor.backbone.traits == pair.predictor.backbone.traits
    assert loaded.predict(texts) == pair.predict(texts)


@pytest.mark.parametrize("places", [None, [0, 3, 5, 6, 9, 11, 20]])
def test_of_the_last_block_only_the_start_token_is_computed(places):
    backbone, rows = make_rationalizer().predictor.backbone, []
    content = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    places = None if places is None else torch.tensor([places] * 3)
    last = backbone.model.encoder.layer[-1].intermediate
    handle = last.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[1]))
    whole = last_states(backbone.model, backbone.traits, content, mask, places)[:, 0]
    first = backbone._pooled(content, mask, places)
    handle.remove()
    assert rows == [7, 1]
    torch.testing.assert_close(first, whole, rtol=0, atol=1e-6)
    parameters = [content, *(p for n, p in backbone.named_parameters() if "word_embeddings" not in n)]
    gradients = [torch.autograd.grad(each.square().sum(), parameters) for each in (whole, first)]
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expanded(mask).shape == (3, 1, 1, 7)
