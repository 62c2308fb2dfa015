"""The vision transformer family: its operators, its preprocessing inside the network, its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_image_rationalizer, make_rationalizer
from torch.nn.functional import interpolate

from rekd_train.checkpoints.checkpoint import checkpoint_hash, load, save
from rekd_train.config.run import BackboneConfig, ImageConfig, run_config
from rekd_train.errors import CheckpointError, ConfigError, InputError
from rekd_train.inputs.policy import PAPER_POLICY
from rekd_train.inputs.prediction import Patch
from rekd_train.models.base import Predictor
from rekd_train.models.families import build_backbone
from rekd_train.models.gates import kept_positions
from rekd_train.models.image_encoder import image_network
from rekd_train.models.rationalizer import Rationalizer


def images(count: int = 5, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 12, 1), dtype=np.uint8)


def tensors(count: int = 5, seed: int = 3) -> dict[str, torch.Tensor]:
    return {"pixels": torch.from_numpy(images(count, seed))}


def swapped(inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Other pixels wherever the mask (B, 12) keeps nothing."""
    kept = mask.view(-1, 4, 3).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(-1)
    return {"pixels": torch.where(kept, inputs["pixels"], 255 - inputs["pixels"])}


@pytest.fixture
def wide() -> BackboneConfig:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    image = ImageConfig(height=8, width=8, channels=3, patch=4, upscale_to=16, mean=mean, std=std)
    return BackboneConfig(family="vit", layers=2, width=14, heads=2, feedforward=61, image=image)


def test_states_are_timms_own(wide: BackboneConfig) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(wide, {}).eval()
    pixels = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    resized = interpolate(pixels.permute(0, 3, 1, 2) / 255.0, size=(16, 16), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (wide.image.mean, wide.image.std))
    normalised = (resized - mean) / std
    expected = backbone.model.forward_features(normalised)
    for inputs in ({"pixels": pixels}, {"pixel_values": normalised}):
        torch.testing.assert_close(backbone.states(inputs), expected[:, 1:], atol=1e-5, rtol=0)
        whole = backbone.zeroed(inputs, torch.ones(3, 16))
        torch.testing.assert_close(whole, expected[:, 0], atol=1e-5, rtol=0)
        assert backbone.selectable(inputs).shape == (3, 16) and backbone.selectable(inputs).all()


def test_settings_reach_the_network(wide: BackboneConfig) -> None:
    backbone = build_backbone(wide.model_copy(update={"final_norm": False, "layer_norm_eps": 1e-3}), {})
    assert backbone.model.blocks[0].mlp.fc1.out_features == 61, "14 * (61 / 14) rounds down to 60"
    assert backbone.model.blocks[0].norm1.eps == 1e-3
    absent = ("model.norm.", "model.fc_norm", "model.head", "mean", "std")
    assert not [name for name in backbone.state_dict() if name.startswith(absent)]
    assert "model.norm.weight" in build_backbone(wide, {}).state_dict()


def test_blank_patches_leave_their_position_behind(image_rationalizer: Rationalizer) -> None:
    backbone, inputs = image_rationalizer.predictor.backbone, tensors()
    nothing = torch.zeros(5, 12)
    blank = backbone.zeroed(inputs, nothing)
    assert torch.equal(blank, blank[:1].expand_as(blank)), "content of a dropped patch shows"
    with torch.no_grad():
        backbone.model.pos_embed[:, 5].add_(torch.arange(12.0))
        assert not torch.allclose(backbone.zeroed(inputs, nothing), blank), "blank slots are attended"
        backbone.model.pos_embed[:, 5].sub_(torch.arange(12.0))


def test_zeroing_carries_a_gradient(image_rationalizer: Rationalizer) -> None:
    keep = torch.full((5, 12), 0.7, requires_grad=True)
    image_rationalizer.predictor.backbone.zeroed(tensors(), keep).square().sum().backward()
    assert (keep.grad.abs() > 0).all()


def test_attending_to_kept_patches_equals_gathering_them(image_rationalizer: Rationalizer) -> None:
    inputs = tensors(9)
    mask = torch.rand(9, 12, generator=torch.Generator().manual_seed(0)) > 0.6
    mask[0], mask[1] = False, True
    backbone = image_rationalizer.predictor.backbone
    gathered = backbone.gathered(inputs, *kept_positions(mask, 12))
    torch.testing.assert_close(backbone.attended(inputs, mask), gathered, atol=1e-5, rtol=0)


@pytest.mark.parametrize("operator", ["zero", "compact"])
def test_dropped_patches_change_nothing(operator: str) -> None:
    model = make_image_rationalizer(operator=operator)
    inputs = tensors()
    with torch.inference_mode():
        mask = model.select(inputs).mask
        assert 0 < mask.sum() < mask.numel()
        other = swapped(inputs, mask)
        assert torch.equal(model.class_logits(inputs, mask), model.class_logits(other, mask))
        assert torch.equal(model.gathered_class_logits(inputs, mask), model.gathered_class_logits(other, mask))
        assert not torch.allclose(model.class_logits(inputs), model.class_logits(other))


def test_images_of_the_wrong_size_are_refused(image_rationalizer: Rationalizer) -> None:
    with pytest.raises(InputError, match=r"images are \(1, 8, 8\).*expected \(1, 16, 12\)"):
        image_rationalizer.select({"pixels": torch.zeros(1, 8, 8, 1, dtype=torch.uint8)})


def test_predict_gives_patches_and_survives_the_checkpoint(image_rationalizer: Rationalizer, tmp_path: Path) -> None:
    answers = image_rationalizer.predict(images(), batch_size=2)
    assert len(answers) == 5 and all(isinstance(patch, Patch) for answer in answers for patch in answer.rationale)
    assert all(1 <= len(answer.rationale) <= image_rationalizer.capacity == 4 for answer in answers)
    directory = save(image_rationalizer, tmp_path / "images")
    loaded = load(directory)
    assert loaded.predict(list(images()), batch_size=2) == answers
    assert len(checkpoint_hash(directory)) == 64
    card = (directory / "README.md").read_text()
    assert "classifies images" in card and "at most 0.4 of the patches" in card


def test_a_checkpoint_whose_grid_was_edited_is_refused(image_rationalizer: Rationalizer, tmp_path: Path) -> None:
    directory = save(image_rationalizer, tmp_path / "images")
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"rows": 4', '"rows": 5'))
    with pytest.raises(CheckpointError, match="5 x 3 patches"):
        load(directory)


def test_capacity_without_budget_is_every_patch() -> None:
    assert make_image_rationalizer(policy=PAPER_POLICY).capacity == 12


def test_text_and_images_do_not_mix(image_rationalizer: Rationalizer) -> None:
    text = make_rationalizer()
    with pytest.raises(ConfigError, match="reads no images"):
        Rationalizer(text.selector, text.predictor, text.policy, image_rationalizer.preprocessor, text.labels)
    with pytest.raises(ConfigError, match="reads images"):
        Rationalizer(
            image_rationalizer.selector, image_rationalizer.predictor, text.policy, text.preprocessor, ["a", "b", "c"]
        )
    with pytest.raises(ConfigError, match="section 'image'"):
        build_backbone(BackboneConfig(family="vit"), {})


def test_image_settings_are_checked_together(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    selector, predictor = "[selector.image]\nheight = 10\nwidth = 8\npatch = 4\n", "[predictor.image]\nstd = [0, 1]\n"
    path.write_text(f'name = "x"\n{selector}{predictor}')
    with pytest.raises(ConfigError, match=r"selector.image: patch \(4\) must divide.*predictor.image: std must hold 1"):
        run_config(path)


TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
TOKENS = {
    "vit_tiny_patch16_224": "start", "deit3_small_patch16_224": "start", "vit_small_patch16_dinov3": "mean",
    "vit_small_patch14_reg4_dinov2": "start", "vit_base_patch16_siglip_224": "attention",
    "vit_base_patch16_clip_224": "start", "eva02_tiny_patch14_224": "mean", "vit_small_patch16_rope_mixed_224": "start",
    "beit_base_patch16_224": "mean",
}  # fmt: skip
"""Networks of timm whose features are patch tokens, and what their classifiers read."""
OTHERS = {
    "swin_tiny_patch4_window7_224": {"window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)},
    "resnet18": {},
}  # fmt: skip


def network_of_timm(name: str, pooling: str, arguments: dict) -> tuple:
    """The backbone and pixel values for it."""
    patch = 14 if "patch14" in name else 16
    sized = {} if name == "resnet18" else {"img_size": 4 * patch}
    image = ImageConfig(height=4 * patch, width=4 * patch, patch=patch, channels=3)
    architecture = {"name": name, "arguments": {**sized, **arguments}}
    torch.manual_seed(0)
    width = 512 if name == "resnet18" else 32 if "swin" in name else 48
    settings = BackboneConfig(
        family="timm", width=width, heads=2, layers=2, pooling=pooling, architecture=architecture, image=image
    )
    backbone = build_backbone(settings, {}).eval()
    with torch.no_grad():  # some start with scales so small that no block shows
        for parameter in backbone.model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.xavier_normal_(parameter)
            elif "gamma" in "".join(n for n, p in backbone.model.named_parameters() if p is parameter):
                torch.nn.init.ones_(parameter)
    return backbone, {"pixel_values": torch.randn(3, 3, 4 * patch, 4 * patch)}


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_networks_of_patch_tokens_are_timms_own_and_gather(name):
    backbone, inputs = network_of_timm(name, TOKENS[name], TINY)
    network = image_network(backbone.settings).eval()
    network.load_state_dict(backbone.model.state_dict())
    own = network.forward_head(network.forward_features(inputs["pixel_values"]), pre_logits=True)
    torch.testing.assert_close(backbone.zeroed(inputs, torch.ones(3, 16)), own, atol=1e-5, rtol=1e-5)
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    attended = backbone.attended(inputs, keep)
    torch.testing.assert_close(backbone.gathered(inputs, *kept_positions(keep, 16)), attended, atol=1e-5, rtol=1e-5)
    side = backbone.image.patch
    shown = keep.view(3, 1, 4, 4).repeat_interleave(side, 2).repeat_interleave(side, 3)
    other = {"pixel_values": torch.where(shown, inputs["pixel_values"], 0.0)}
    assert torch.equal(backbone.attended(other, keep), attended)
    assert backbone.states(inputs).shape == (3, 16, 48)


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_networks_blank_patches_of_the_image(name):
    backbone, inputs = network_of_timm(name, "mean", OTHERS[name])
    own = backbone.model.forward_head(backbone.model.forward_features(inputs["pixel_values"]), pre_logits=True)
    torch.testing.assert_close(backbone.zeroed(inputs, torch.ones(3, 16)), own)
    assert backbone.states(inputs).shape == (3, 16, backbone.settings.width)
    with pytest.raises(ConfigError, match="'compact'; operators of this backbone: zero"):
        Predictor(backbone, 2, "compact")


def test_networks_that_timm_cannot_build_are_refused():
    image = ImageConfig(height=64, width=64, patch=16)
    settings = BackboneConfig(family="timm", image=image, architecture={"name": "vit_gigantic", "arguments": {}})
    with pytest.raises(ConfigError, match="timm cannot build 'vit_gigantic'"):
        build_backbone(settings, {})
    with pytest.raises(ConfigError, match=r"cuts images into \(4, 4\) patches.*\(8, 8\); fix: image.patch"):
        arguments = {**TINY, "img_size": 64}
        network = {"name": "vit_tiny_patch16_224", "arguments": arguments}
        build_backbone(settings.model_copy(update={"architecture": network, "image": ImageConfig(
            height=64, width=64, patch=8)}), {})  # fmt: skip
