"""What a pair computes, of every family: removed features have no influence, gradients flow; networks of images."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from conftest import make_bilstm, make_image_rationalizer, make_ngrams, make_rationalizer
from torch.nn.functional import interpolate
from toys import toy_config

from rekd_train.checkpoints.checkpoint import load, save
from rekd_train.config.run import BackboneConfig, ImageConfig, run_config
from rekd_train.errors import CheckpointError, ConfigError, InputError
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, mask_by_specification
from rekd_train.models import base
from rekd_train.models.base import Predictor, kept_positions
from rekd_train.models.families import build_backbone, fresh_pair
from rekd_train.models.image_encoder import image_network
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.losses import gumbel

FAMILIES = {"transformers": partial(make_rationalizer, 1), "bilstm": make_bilstm, "ngrams": make_ngrams,
            "timm": make_image_rationalizer}
IMAGES = np.random.default_rng(3).integers(0, 256, (5, 16, 12, 1), dtype=np.uint8)
WITH_PADDING = SelectionPolicy(bias=None, budget=0.5, minimum=0, selectable="all")


def tensors(pair, items, pad_to=None):
    return {name: torch.from_numpy(a) for name, a in pair.preprocessor(items, pad_to).inputs.items()}


@pytest.fixture(scope="module", params=product(FAMILIES, ["compact", "zero"]), ids=" ".join)
def pair(request):
    family, operator = request.param
    return FAMILIES[family](operator=operator)


@pytest.fixture
def items(pair, texts):
    return texts if pair.preprocessor.settings.kind == "text" else IMAGES


@pytest.fixture
def inputs(pair, items):
    return tensors(pair, items)


def changed(inputs, where):
    """Other content at the features (B, N) that are named."""
    if "pixels" in inputs:
        patches = where.view(-1, 4, 3).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(-1)
        return {"pixels": torch.where(patches, 255 - inputs["pixels"], inputs["pixels"])}
    return inputs | {"input_ids": torch.where(where, (inputs["input_ids"] + 3) % 40 + 7, inputs["input_ids"])}


def alone(*positions: int) -> torch.Tensor:
    return torch.isin(torch.arange(16), torch.tensor(positions))[None]


def positions(answer) -> list[int]:
    return [piece.position for piece in answer.pieces] or [patch.row * 3 + patch.column for patch in answer.rationale]


@torch.inference_mode()
def test_shapes_and_types(pair, items, inputs):
    logits, (scores, mask) = pair.selector_logits(inputs), pair.select(inputs)
    found = [(tuple(t.shape), t.dtype) for t in (logits, scores, mask, pair.class_logits(inputs, mask))]
    size, real = tuple(mask.shape), torch.float32
    assert found == [((*size, 2), real), (size, real), (size, torch.bool), ((len(mask), len(pair.labels)), real)]
    assert torch.equal(scores, base.selection_scores(logits))
    assert len({id(p) for p in pair.parameters()}) == sum(len(list(m.parameters())) for m in pair.children())
    expected = mask_by_specification(scores.numpy(), pair.selectable(inputs).numpy(), pair.policy)
    assert mask.numpy().tolist() == expected.tolist() and (mask.sum(dim=1) >= 1).all()
    assert torch.equal(pair.class_logits(inputs), pair.class_logits(inputs, pair.selectable(inputs)))
    if "input_ids" in inputs:  # words alone are selectable
        for row, encoding in zip(pair.selectable(inputs), pair.preprocessor.encode(items), strict=True):
            expected = [not special for special in encoding.special_tokens_mask]
            assert row.tolist() == expected + [False] * (len(row) - len(expected))


@torch.inference_mode()
def test_ngrams_know_neighbours_the_whole_text_and_nothing_of_those_no_text_had():
    backbone = make_ngrams().selector.backbone
    ids = torch.tensor([[2, 8, 9, 10, 11, 3]])

    def content(ids):
        return backbone.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).chunk(2, dim=2)

    (words, told), (other, others) = content(ids), content(ids[:, [0, 2, 1, 3, 4, 5]])
    assert torch.equal(words[:, 4:], other[:, 4:]) and not torch.equal(words[:, 3], other[:, 3]), "as far as triples go"
    assert not torch.equal(told[:, 4], others[:, 4]), "the mean is another"
    backbone.ngrams.weight.zero_()
    (words, _), (other, _) = content(ids), content(ids[:, [0, 2, 1, 3, 4, 5]])
    assert torch.equal(words[:, [0, 2, 1, 3, 4, 5]], other)
    fresh = build_backbone(backbone.settings, backbone.special_ids)
    assert not fresh.ngrams.weight.any() and fresh.embeddings.weight.any()


def test_pairs_and_triples_are_left_out_in_training_at_the_share_that_is_set():
    settings = make_ngrams().selector.backbone.settings.model_copy(update={"dropout": 0.75})
    backbone = build_backbone(settings, {"pad": 0}).train()
    with torch.no_grad():
        backbone.embeddings.weight.zero_()
        backbone.ngrams.weight.fill_(1.0)
    ids = torch.arange(400)[None] % 40 + 3
    content = backbone.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0, 1:-1, :6]
    assert set(content.unique().tolist()) == {0.0, 3.0}, "those that stay are not scaled"
    assert (content > 0).float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert (backbone.eval().states({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0, 1:-1, :6] == 3).all()


@pytest.mark.parametrize("policy", [SelectionPolicy(budget=0.5), PAPER_POLICY, WITH_PADDING])
@torch.inference_mode()
def test_capacity_and_budget_are_those_of_the_longest_input(policy):
    pair = make_rationalizer(policy=policy)
    inputs = tensors(pair, ["good bad fun " * 30])
    (scores, mask), selectable = pair.select(inputs), pair.selectable(inputs)
    assert selectable.shape[1] == 48 and pair.capacity == policy.capacity(selectable.sum().item())
    expected = mask_by_specification(scores.numpy(), selectable.numpy(), policy)
    assert mask.sum().item() == expected.sum() and (policy is not WITH_PADDING or expected.sum() == 24)
    assert make_image_rationalizer(policy=policy).capacity == (12 if policy.budget is None else 6)


def test_predict_is_the_sum_of_its_parts(pair, items, inputs):
    with torch.no_grad():
        scores, mask = pair.select(inputs)
        probabilities = torch.softmax(pair.class_logits(inputs, mask) / pair.probability_temperature, dim=-1)
    pair.train()
    torch.manual_seed(123)  # no dropout, no noise
    whole, single = pair.predict(items), pair.predict(items, batch_size=1)
    for row, (answer, other) in enumerate(zip(whole, single, strict=True)):
        kept = mask[row].nonzero().flatten().tolist()
        assert answer.label == pair.labels[probabilities[row].argmax()]
        for found in (answer, other):
            assert positions(found) == kept
            assert list(found.probabilities.values()) == pytest.approx(probabilities[row].tolist(), abs=1e-5)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_gates_of_gathered_features_have_the_gradient_of_their_content(make, texts):
    """Against finite differences; a slot that is not kept has none and is not read."""
    pair = make(operator="compact")
    words = pair.preprocessor.settings.kind == "text"
    pair, size = (pair.double(), 1e-5) if words else (pair, 1e-2)  # the mask of a vision transformer is float32
    inputs = tensors(pair, texts if words else IMAGES)
    mask = pair.select(inputs).mask
    slots, kept = kept_positions(mask, int(mask.sum(dim=1).max()) + 2)
    gates = kept.to(next(pair.parameters()).dtype).requires_grad_()
    def loss(gates):
        return pair.predictor.head(pair.predictor.backbone.gathered(inputs, slots, gates)).square().sum()
    assert loss(gates) == pair.predictor.head(pair.predictor.backbone.gathered(inputs, slots, kept)).square().sum()
    loss(gates).backward()
    assert (gates.grad[~kept] == 0).all() and (gates.grad[kept] != 0).all()
    for row, slot in kept.nonzero()[:6].tolist():
        step = torch.zeros_like(gates)
        step[row, slot] = size
        with torch.no_grad():
            slope = (loss(gates + step) - loss(gates - step)) / (2 * size)
        assert gates.grad[row, slot].item() == pytest.approx(slope.item(), rel=1e-2, abs=1e-4)


@torch.inference_mode()
def test_what_is_not_selected_has_no_influence_at_all_and_what_is_has(pair, inputs):
    """The swap test: other content in every unselected place, the mask held, the same logits bit for bit."""
    mask = pair.select(inputs).mask
    dropped = pair.selectable(inputs) & ~mask
    other = changed(inputs, dropped)
    assert dropped.sum() > 20 and mask.any()
    for logits in (pair.class_logits, pair.gathered_class_logits):
        assert torch.equal(logits(inputs, mask), logits(other, mask))
    if pair.predictor.operator == "compact":
        masked, gathered = pair.class_logits(inputs, mask), pair.gathered_class_logits(inputs, mask)
        torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=0)
    assert not torch.allclose(pair.class_logits(inputs), pair.class_logits(other))
    difference = pair.class_logits(inputs, mask) - pair.class_logits(changed(inputs, mask), mask)
    assert (difference.abs().amax(dim=1) > 1e-4).all()


@torch.inference_mode()
def test_compact_sees_positions_but_not_the_length_of_the_text_and_zero_multiplies_the_content():
    pair = make_rationalizer()
    films, longer = (tensors(pair, [" ".join(["film"] * count)]) for count in (10, 13))
    early, late = (pair.gathered_class_logits(films, alone(position)) for position in (2, 9))
    assert not torch.allclose(early, late, atol=1e-4), "the same word at another place is another input"
    assert torch.equal(pair.class_logits(films, alone(2)), pair.class_logits(longer, alone(2))), "[SEP] would tell"
    # against an independent computation: embeddings times the mask, special tokens untouched, all attended
    pair = make_rationalizer(operator="zero")
    inputs, bert = tensors(pair, ["the film was great"]), pair.predictor.backbone.model
    content = bert.embeddings.word_embeddings(inputs["input_ids"]).clone()
    content[0, [1, 3]] = 0.0
    state = bert(inputs_embeds=content, attention_mask=inputs["attention_mask"]).last_hidden_state[:, 0]
    found = pair.class_logits(inputs, alone(2, 4).float())
    torch.testing.assert_close(found, pair.predictor.head(state), atol=1e-6, rtol=1e-6)


def test_the_gate_is_hard_forward_and_soft_backward_and_networks_start_as_said():
    logits = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    noise = gumbel(1, torch.arange(3), 7)
    gate = base.straight_through_gate(logits, 0.7, noise)
    soft = torch.softmax((logits + noise) / 0.7, dim=-1)[..., 1]
    assert torch.equal(gate.mask, (soft > 0.5).float()), "exactly 0 or 1: blanks must hold nothing at all"
    assert 0 < gate.mask.sum() < 21
    weights = torch.arange(1.0, 22.0).reshape(3, 7)
    (gate.mask * weights).sum().backward()
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.testing.assert_close(logits.grad, expected)
    assert (logits.grad != 0).all()
    assert torch.equal(base.straight_through_gate(logits, 0.1, None).mask > 0.5, base.selection_scores(logits) > 0)
    assert torch.equal(base.relaxed_log_choice(logits, 2.0, None), torch.log_softmax(logits / 2.0, dim=-1))
    torch.manual_seed(0)
    paper, own = (built(class_head=start).head[1] for start in ("xavier", "pytorch"))
    assert not paper.bias.any() and own.bias.any()
    # Xavier's bound is sqrt(6 / (8 + 3)), PyTorch's 1 / sqrt(8)
    assert own.weight.abs().max() < 0.36 < paper.weight.abs().max() <= (6 / 11) ** 0.5
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    image = ImageConfig(height=8, width=8, channels=3, patch=4, upscale_to=16, mean=mean, std=std)
    wide = BackboneConfig(family="vit", layers=2, width=14, heads=2, feedforward=61, image=image)
    torch.manual_seed(0)
    backbone = build_backbone(wide, {}).eval()
    pixels = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    resized = interpolate(pixels.permute(0, 3, 1, 2) / 255.0, size=(16, 16), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    expected = backbone.model.forward_features((resized - mean) / std)
    for inputs in ({"pixels": pixels}, {"pixel_values": (resized - mean) / std}):
        torch.testing.assert_close(backbone.states(inputs), expected[:, 1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(backbone.zeroed(inputs, torch.ones(3, 16)), expected[:, 0], atol=1e-5, rtol=0)
        assert backbone.selectable(inputs).shape == (3, 16) and backbone.selectable(inputs).all()
    bare = build_backbone(wide.model_copy(update={"final_norm": False, "layer_norm_eps": 1e-3}), {})
    assert bare.model.blocks[0].mlp.fc1.out_features == 61, "14 * (61 / 14) rounds down to 60"
    assert bare.model.blocks[0].norm1.eps == 1e-3 and "model.norm.weight" in backbone.state_dict()
    absent = ("model.norm.", "model.fc_norm", "model.head", "mean", "std")
    assert not [name for name in bare.state_dict() if name.startswith(absent)]


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_the_gradient_reaches_the_selector_through_every_place_of_the_mask(make, texts):
    pair = make(operator="zero").train()
    inputs = tensors(pair, texts if make is not make_image_rationalizer else IMAGES)
    gate = base.straight_through_gate(pair.selector_logits(inputs), 1.0, None)
    gate.mask.retain_grad()
    labels = torch.zeros(len(IMAGES), dtype=torch.long)
    torch.nn.functional.cross_entropy(pair.class_logits(inputs, gate.mask), labels).backward()
    assert torch.equal(gate.mask.grad != 0, pair.selectable(inputs))
    first = next(pair.selector.backbone.parameters())
    assert pair.selector.head[-1].weight.grad.abs().sum() > 0 and first.grad.abs().sum() > 0
    assert next(pair.predictor.backbone.parameters()).grad.abs().sum() > 0


TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SQUARE = {"name": "vit_tiny_patch16_224", "arguments": {**TINY, "img_size": 64}}


def built(operator: str = "zero", **settings) -> Predictor:
    sizes = {"layers": 1, "width": 8, "heads": 2, "feedforward": 8, "positions": 8, "vocabulary": 50}
    return Predictor(build_backbone(BackboneConfig(**sizes | settings), {"pad": 0}), 3, operator)


def mixed(networks, preprocessing) -> Rationalizer:
    return Rationalizer(networks.selector, networks.predictor, networks.policy, preprocessing.preprocessor, "abc")


@pytest.mark.parametrize(("attempt", "message"), [
    (lambda: built(family="lstm"), "unknown family 'lstm'; families: .*transformers"),
    (lambda: built(family="bilstm", width=7, heads=1), "even width"),
    (lambda: built(family="ngrams", width=7, heads=1), "even width"), (lambda: built(family="vit"), "section 'image'"),
    (lambda: built("sideways"), "'sideways'.*zero, compact"),
    (lambda: built(family="timm", image=ImageConfig(height=64, width=64, patch=16), architecture={"name": "vit_giant"}),
     "timm cannot build 'vit_giant'"),
    (lambda: built(family="timm", image=ImageConfig(height=64, width=64, patch=8), architecture=SQUARE),
     r"cuts images into \(4, 4\) patches.*\(8, 8\) of 8; fix: image.patch"),
    (lambda: mixed(make_rationalizer(labels="abc"), make_image_rationalizer()), "reads no images"),
    (lambda: mixed(make_image_rationalizer(), make_rationalizer()), "reads images"),
    (lambda: run_config("fashion_teacher", ["selector.image.height=10", "selector.image.width=8",
                                            "selector.image.patch=4", "predictor.image.std=[0, 1]"]),
     r"selector.image: patch \(4\) must divide.*predictor.image: std must hold 1"),
    (lambda: make_image_rationalizer().select({"pixels": torch.zeros(1, 8, 8, 1, dtype=torch.uint8)}),
     r"images are \(1, 8, 8\).*expected \(1, 16, 12\)")])  # fmt: skip
def test_what_does_not_fit_is_named(attempt, message):
    with pytest.raises((ConfigError, InputError), match=message):
        attempt()


@torch.no_grad()
def test_image_pairs_blank_patches_and_their_checkpoints_hold_a_grid(
    image_rationalizer: Rationalizer, tmp_path) -> None:
    backbone, inputs = image_rationalizer.predictor.backbone, {"pixels": torch.from_numpy(IMAGES)}
    blank = backbone.zeroed(inputs, torch.zeros(5, 12))
    assert torch.equal(blank, blank[:1].expand_as(blank)), "content of a dropped patch shows"
    backbone.model.pos_embed[:, 5].add_(torch.arange(12.0))
    assert not torch.allclose(backbone.zeroed(inputs, torch.zeros(5, 12)), blank), "blank slots are attended"
    backbone.model.pos_embed[:, 5].sub_(torch.arange(12.0))
    assert image_rationalizer.selector.backbone.columns == 3 and make_rationalizer().selector.backbone.columns is None
    directory = save(image_rationalizer, tmp_path / "images")
    assert load(directory).predict(IMAGES, batch_size=2) == image_rationalizer.predict(list(IMAGES), batch_size=2)
    card = (directory / "README.md").read_text()
    assert "classifies images" in card and "at most 0.4 of the patches" in card
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"rows": 4', '"rows": 5'))
    with pytest.raises(CheckpointError, match="5 x 3 patches"):
        load(directory)


def test_a_run_that_gathers_patches_which_a_network_does_not_have_is_refused_before_it_begins():
    image = {"height": 64, "width": 64, "patch": 16}
    network = {"family": "timm", "width": 512, "image": image, "architecture": {"name": "resnet18", "arguments": {}}}
    config = toy_config(data={"name": "digits"}, selector=network, predictor=network, stages={"operator": "gather"})
    preprocessor = ImagePreprocessor(ImageSettings.of(config.predictor))
    with pytest.raises(ConfigError, match="fix: --set stages.operator=zero --set stages.compact_epochs=0"):
        fresh_pair(config, preprocessor, "ab")


SWIN = {"window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
NETWORKS = {"vit_tiny_patch16_224": "start", "deit3_small_patch16_224": "start", "vit_small_patch16_dinov3": "mean",
            "vit_small_patch14_reg4_dinov2": "start", "vit_base_patch16_siglip_224": "attention",
            "vit_base_patch16_clip_224": "start", "eva02_tiny_patch14_224": "mean",
            "vit_small_patch16_rope_mixed_224": "start", "beit_base_patch16_224": "mean",
            "swin_tiny_patch4_window7_224": "", "resnet18": "", "vit_tiny_r_s16_p8_224": "",
            "vit_small_r26_s32_224": ""}  # fmt: skip
"""What the classifiers of timm's networks read whose features are patch tokens; the features of others are none."""


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_are_timms_own_and_gather_or_blank_patches_of_the_image(name):
    side = next((side for part, side in {"patch14": 14, "r_s16": 32, "r26": 32}.items() if part in name), 16)
    sized = {} if name == "resnet18" else {"img_size": 4 * side, **(SWIN if "swin" in name else TINY)}
    width = 512 if name == "resnet18" else 32 if "swin" in name else 48
    image = ImageConfig(height=4 * side, width=4 * side, patch=side, channels=3)
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(family="timm", width=width, heads=2, layers=2,
                                             pooling=NETWORKS[name] or "mean", image=image,
                                             architecture={"name": name, "arguments": sized}), {}).eval()  # fmt: skip
    for parameter_name, parameter in backbone.model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter)
        elif "gamma" in parameter_name:  # some start with scales so small that no block shows
            torch.nn.init.ones_(parameter)
    inputs = {"pixel_values": torch.randn(3, 3, 4 * side, 4 * side)}
    network = image_network(backbone.settings).eval()
    network.load_state_dict(backbone.model.state_dict())
    own = network.forward_head(network.forward_features(inputs["pixel_values"]), pre_logits=True)
    torch.testing.assert_close(backbone.zeroed(inputs, torch.ones(3, 16)), own, atol=1e-5, rtol=1e-5)
    assert backbone.states(inputs).shape == (3, 16, width)
    if not NETWORKS[name]:
        with pytest.raises(ConfigError, match="'compact'; operators of this backbone: zero"):
            Predictor(backbone, 2, "compact")
        with pytest.raises(ConfigError, match="no content.*fix: --set stages.operator=zero"):
            backbone.content(inputs)
        return
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    attended = backbone.attended(inputs, keep)
    torch.testing.assert_close(backbone.gathered(inputs, *kept_positions(keep, 16)), attended, atol=1e-5, rtol=1e-5)
    shown = keep.view(3, 1, 4, 4).repeat_interleave(side, 2).repeat_interleave(side, 3)
    other = {"pixel_values": torch.where(shown, inputs["pixel_values"], 0.0)}
    assert torch.equal(backbone.attended(other, keep), attended)
