"""Encoders of transformers as backbones: what a probe finds is true, whatever the kind."""

from __future__ import annotations

import pytest
import torch
from conftest import encoder_settings, make_encoder_pair, make_rationalizer, tiny_tokenizer_json

from rekd_train.checkpoints.checkpoint import load, save
from rekd_train.errors import ConfigError
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models import text_encoder
from rekd_train.models.encoder_traits import expanded, last_states
from rekd_train.models.families import build_backbone
from rekd_train.models.gates import kept_positions

GATHERING = {
    "bert": "exact", "roberta": "exact", "xlm-roberta": "exact", "camembert": "exact", "electra": "exact",
    "distilbert": "exact", "albert": "exact", "ernie": "exact", "nomic_bert": "exact", "eurobert": "exact",
    "modernbert": "windowed", "mpnet": "packed", "deberta": "packed", "deberta-v2": "packed", "roformer": "packed",
}  # fmt: skip
"""How each kind sees kept tokens alone, and so what its compact input means."""
LENGTH = 150
"""Longer than a local window of ModernBERT's."""


def backbone_of(kind: str, **changes):
    special_ids = TextPreprocessor(tiny_tokenizer_json(), TextSettings(48)).special_ids
    torch.manual_seed(0)
    return build_backbone(encoder_settings(kind, **changes), special_ids).eval()


def some_inputs(seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three texts of different lengths, and a tenth of their tokens to keep."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, 40, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 100:], mask[2, 15:] = 0, 0
    keep = (torch.rand(ids.shape, generator=generator) < 0.1) & (mask > 0)
    keep[:, 0] = False
    return {"input_ids": ids, "attention_mask": mask}, keep


@pytest.mark.parametrize("kind", GATHERING)
@torch.no_grad()
def test_kept_tokens_alone_give_what_masked_ones_give(kind):
    backbone = backbone_of(kind)
    assert backbone.traits.gathering == GATHERING[kind]
    inputs, keep = some_inputs()
    positions, kept = kept_positions(keep, 25)
    for pooling in ("start", "mean"):
        backbone.settings = backbone.settings.model_copy(update={"pooling": pooling})
        attended = backbone.attended(inputs, keep)
        torch.testing.assert_close(backbone.gathered(inputs, positions, kept), attended, atol=1e-5, rtol=0)
        hidden = torch.where(keep, inputs["input_ids"], 7).index_fill(1, torch.tensor([0]), 8)
        shown = inputs["input_ids"].index_fill(1, torch.tensor([0]), 8)
        assert torch.equal(
            backbone.attended({**inputs, "input_ids": hidden}, keep),
            backbone.attended({**inputs, "input_ids": shown}, keep),
        ), "tokens that are not kept have an influence"


@pytest.mark.parametrize("kind", GATHERING)
@torch.no_grad()
def test_padding_and_neighbours_change_no_state(kind):
    backbone, (inputs, keep) = backbone_of(kind), some_inputs()
    whole = backbone.states(inputs)
    alone = backbone.states({name: tensor[2:, :15] for name, tensor in inputs.items()})
    torch.testing.assert_close(whole[2:, :15], alone, atol=1e-5, rtol=0)
    zeroed = backbone.zeroed(inputs, keep.float())
    alone = backbone.zeroed({name: tensor[2:, :15] for name, tensor in inputs.items()}, keep[2:, :15].float())
    torch.testing.assert_close(zeroed[2:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mobilebert", "lets padding change its states"),
        ("convbert", "lets padding change its states"),
        ("gpt2", "reads in one direction only.*fix: a bidirectional encoder"),
        ("llama", "reads in one direction only"),
        ("t5", "does not run on embeddings alone"),
        ("ibert", "has no plain table of word embeddings"),
        ("clip", "no encoder|cannot be built|takes no|does not run"),
    ],
)
def test_encoders_that_cannot_be_a_backbone_are_refused_with_the_reason(kind, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        backbone_of(kind)
    assert kind in str(caught.value) and "\n" not in str(caught.value)


def test_the_probe_draws_nothing_from_the_run():
    draws = []
    for settings in (encoder_settings("roberta"), backbone_of("roberta").settings):
        torch.manual_seed(0)
        backbone = text_encoder.TextEncoder(settings, {"pad": 0})
        draws.append((torch.rand(3), backbone.table.weight.detach().clone()))
    for probed, recorded in zip(*draws, strict=True):
        assert torch.equal(probed, recorded)


def test_a_checkpoint_records_architecture_and_traits_and_is_not_probed_again(tmp_path, monkeypatch, texts):
    pair = make_encoder_pair("modernbert")
    directory = save(pair, tmp_path / "pair")
    monkeypatch.setattr(text_encoder, "probed", lambda config: pytest.fail("probed again"))
    loaded = load(directory)
    assert loaded.predictor.backbone.settings.architecture["model_type"] == "modernbert"
    assert loaded.predictor.backbone.traits == pair.predictor.backbone.traits
    assert loaded.predict(texts) == pair.predict(texts)


def test_fewer_layers_and_own_dropout():
    backbone = backbone_of("modernbert", layers=1, dropout=0.3, attention_dropout=0.2)
    assert len(backbone.model.layers) == 1
    assert (backbone.model.config.mlp_dropout, backbone.model.config.attention_dropout) == (0.3, 0.2)


@pytest.mark.parametrize("positions", [False, True])
def test_of_the_last_block_only_the_start_token_is_computed(positions):
    backbone = make_rationalizer().predictor.backbone
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(3, 7, backbone.settings.width, generator=generator, requires_grad=True)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    places = torch.tensor([[0, 3, 5, 6, 9, 11, 20]] * 3) if positions else None
    rows = []
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
