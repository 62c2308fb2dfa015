"""One tiny pair of each kind that can be exported, for the tests of export and serving."""

import io
from dataclasses import replace

import numpy as np
import torch
from conftest import make_bilstm, make_encoder_pair, make_image_rationalizer, make_ngrams, make_rationalizer
from PIL import Image

from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy
from rekd_train.models.base import Predictor, Selector
from rekd_train.models.families import build_backbone
from rekd_train.models.rationalizer import Rationalizer

KINDS = {"bert": make_rationalizer, "bert-zero": lambda: make_rationalizer(operator="zero"),
         "bert-paper": lambda: make_rationalizer(operator="zero", policy=PAPER_POLICY), "bilstm": make_bilstm,
         "bilstm-zero": lambda: make_bilstm("zero"), "ngrams": make_ngrams, "vit": make_image_rationalizer,
         "vit-paper": lambda: make_image_rationalizer(operator="zero", policy=PAPER_POLICY)}  # fmt: skip


LIBRARIES = {
    "roberta": lambda: make_encoder_pair("roberta"),  # fewer words than positions
    "eurobert": lambda: make_encoder_pair("eurobert", tokenizer="start token alone"),  # norms without a mean
    "modernbert": lambda: make_encoder_pair("modernbert"),
    "deberta-v2-zero": lambda: make_encoder_pair("deberta-v2", "zero"),
    "deberta-v2": lambda: make_encoder_pair("deberta-v2", pooling="mean"),
    "dinov2": lambda: make_network_pair("vit_small_patch14_reg4_dinov2"),
    "siglip": lambda: make_network_pair("vit_base_patch16_siglip_224", pooling="attention"),
    "dinov3": lambda: make_network_pair("vit_small_patch16_dinov3", pooling="mean"),  # rotary positions alone
}
"""Pairs over encoders and networks as the libraries make them."""


def make_network_pair(name: str, **changes) -> Rationalizer:
    """A random pair over a tiny network of timm: grey images of 16 x 12 become 4 x 4 patches."""
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 16
    image = ImageConfig(height=16, width=12, channels=1, patch=patch, upscale_to=4 * patch)
    arguments = {"img_size": 4 * patch, "embed_dim": 48, "depth": 2, "num_heads": 3}
    architecture = {"name": name, "arguments": arguments}
    settings = BackboneConfig(family="timm", width=48, heads=3, image=image, architecture=architecture, **changes)
    selector, predictor = Selector(build_backbone(settings, {})), Predictor(build_backbone(settings, {}), 3, "compact")
    with torch.no_grad():
        for name, parameter in (*selector.named_parameters(), *predictor.named_parameters()):
            if "gamma" in name:  # some start with blocks that add next to nothing
                torch.nn.init.ones_(parameter)
            elif "backbone" in name and parameter.dim() > 1:
                torch.nn.init.xavier_normal_(parameter)
    policy = SelectionPolicy(bias=0.0, budget=0.4, minimum=1)
    preprocessor = ImagePreprocessor(ImageSettings.of(settings))
    return Rationalizer(selector, predictor, policy, preprocessor, ["shirt", "shoe", "bag"]).eval()


def another(artefacts, number: int):
    return replace(artefacts, manifest={**artefacts.manifest, "checkpoint_sha256": f"{number:064}"})


def some_images(count: int = 9, height: int = 16, width: int = 12) -> list[np.ndarray]:
    return list(np.random.default_rng(3).integers(0, 256, (count, height, width), dtype=np.uint8))


def written(pixels: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def assert_same_answers(answers, expected) -> None:
    """Predictions agree in everything that is discrete, and closely in the rest."""
    assert len(answers) == len(expected)
    for answer, wanted in zip(answers, expected, strict=True):
        same = [(each.text, each.label, each.rate, each.truncated) for each in (answer, wanted)]
        assert same[0] == same[1]
        assert [(p.token, p.position) for p in answer.pieces] == [(p.token, p.position) for p in wanted.pieces]
        for part, other in zip(answer.rationale, wanted.rationale, strict=True):
            assert abs(part.score - other.score) <= 1e-4
            mine, theirs = vars(part) | {"score": 0}, vars(other) | {"score": 0}
            assert type(part) is type(other) and mine == theirs
        np.testing.assert_allclose([*answer.probabilities.values()], [*wanted.probabilities.values()], atol=1e-4)
