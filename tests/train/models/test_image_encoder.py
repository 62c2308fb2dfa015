"""The vision transformer family: its operators, its preprocessing inside the network, its checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_rationalizer
from torch.nn.functional import interpolate

from rekd_train.checkpoints.checkpoint import load, save
from rekd_train.config.run import BackboneConfig, ImageConfig, run_config
from rekd_train.errors import CheckpointError, ConfigError, InputError
from rekd_train.models.base import Predictor, kept_positions
from rekd_train.models.families import build_backbone
from rekd_train.models.rationalizer import Rationalizer

IMAGES = np.random.default_rng(3).integers(0, 256, (5, 16, 12, 1), dtype=np.uint8)


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


@torch.no_grad()
def test_blank_patches_leave_their_position_behind(image_rationalizer: Rationalizer) -> None:
    backbone, inputs = image_rationalizer.predictor.backbone, {"pixels": torch.from_numpy(IMAGES)}
    blank = backbone.zeroed(inputs, torch.zeros(5, 12))
    assert torch.equal(blank, blank[:1].expand_as(blank)), "content of a dropped patch shows"
    backbone.model.pos_embed[:, 5].add_(torch.arange(12.0))
    assert not torch.allclose(backbone.zeroed(inputs, torch.zeros(5, 12)), blank), "blank slots are attended"
    backbone.model.pos_embed[:, 5].sub_(torch.arange(12.0))


def test_images_of_the_wrong_size_are_refused(image_rationalizer: Rationalizer) -> None:
    with pytest.raises(InputError, match=r"images are \(1, 8, 8\).*expected \(1, 16, 12\)"):
        image_rationalizer.select({"pixels": torch.zeros(1, 8, 8, 1, dtype=torch.uint8)})


def test_a_checkpoint_of_images_and_one_whose_grid_was_edited(image_rationalizer, tmp_path) -> None:
    directory = save(image_rationalizer, tmp_path / "images")
    assert load(directory).predict(IMAGES, batch_size=2) == image_rationalizer.predict(list(IMAGES), batch_size=2)
    card = (directory / "README.md").read_text()
    assert "classifies images" in card and "at most 0.4 of the patches" in card
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"rows": 4', '"rows": 5'))
    with pytest.raises(CheckpointError, match="5 x 3 patches"):
        load(directory)


def test_text_and_images_do_not_mix(image_rationalizer: Rationalizer) -> None:
    text, images = make_rationalizer(labels=image_rationalizer.labels), image_rationalizer
    for networks, preprocessing, message in ((text, images, "reads no images"), (images, text, "reads images")):
        with pytest.raises(ConfigError, match=message):
            Rationalizer(
                networks.selector, networks.predictor, text.policy, preprocessing.preprocessor, images.labels
            )


def test_image_settings_are_checked_together() -> None:
    settings = ("selector.image.height=10", "selector.image.width=8", "selector.image.patch=4")
    with pytest.raises(ConfigError, match=r"selector.image: patch \(4\) must divide.*predictor.image: std must hold 1"):
        run_config("fashion_teacher", [*settings, "predictor.image.std=[0, 1]"])


TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
NETWORKS = {
    "vit_tiny_patch16_224": "start", "deit3_small_patch16_224": "start", "vit_small_patch16_dinov3": "mean",
    "vit_small_patch14_reg4_dinov2": "start", "vit_base_patch16_siglip_224": "attention",
    "vit_base_patch16_clip_224": "start", "eva02_tiny_patch14_224": "mean", "vit_small_patch16_rope_mixed_224": "start",
    "swin_tiny_patch4_window7_224": "", "resnet18": "", "beit_base_patch16_224": "",
}  # fmt: skip
"""What the classifiers of timm's networks read whose features are patch tokens; the features of others are none."""


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_are_timms_own_and_gather_or_blank_patches_of_the_image(name):
    side = 14 if "patch14" in name else 16
    sized = {} if name == "resnet18" else {"img_size": 4 * side, **(SWIN if "swin" in name else TINY)}
    width = 512 if name == "resnet18" else 32 if "swin" in name else 48
    image = ImageConfig(height=4 * side, width=4 * side, patch=side, channels=3)
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(
        family="timm", width=width, heads=2, layers=2, pooling=NETWORKS[name] or "mean", image=image,
        architecture={"name": name, "arguments": sized},
    ), {}).eval()  # fmt: skip
    for parameter_name, parameter in backbone.model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter)
        elif "gamma" in parameter_name:  # some start with scales so small that no block shows
            torch.nn.init.ones_(parameter)
    inputs = {"pixel_values": torch.randn(3, 3, 4 * side, 4 * side)}
    own = backbone.model.forward_head(backbone.model.forward_features(inputs["pixel_values"]), pre_logits=True)
    torch.testing.assert_close(backbone.zeroed(inputs, torch.ones(3, 16)), own, atol=1e-5, rtol=1e-5)
    assert backbone.states(inputs).shape == (3, 16, width)
    if not NETWORKS[name]:
        with pytest.raises(ConfigError, match="'compact'; operators of this backbone: zero"):
            Predictor(backbone, 2, "compact")
        return
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    attended = backbone.attended(inputs, keep)
    torch.testing.assert_close(backbone.gathered(inputs, *kept_positions(keep, 16)), attended, atol=1e-5, rtol=1e-5)
    shown = keep.view(3, 1, 4, 4).repeat_interleave(side, 2).repeat_interleave(side, 3)
    other = {"pixel_values": torch.where(shown, inputs["pixel_values"], 0.0)}
    assert torch.equal(backbone.attended(other, keep), attended)


@pytest.mark.parametrize(("name", "patch", "message"), [
    ("vit_gigantic", 16, "timm cannot build 'vit_gigantic'"),
    ("vit_tiny_patch16_224", 8, r"cuts images into \(4, 4\) patches.*\(8, 8\); fix: image.patch"),
])  # fmt: skip
def test_networks_that_timm_cannot_build_are_refused(name, patch, message):
    architecture = {"name": name, "arguments": {**TINY, "img_size": 64}}
    image = ImageConfig(height=64, width=64, patch=patch)
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneConfig(family="timm", image=image, architecture=architecture), {})
