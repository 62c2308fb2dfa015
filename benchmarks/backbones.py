"""Tiny random pairs over many encoders and tokenizers, exported and asked: docs/backbones.md has the table.

    python benchmarks/backbones.py                        # every kind; writes results/backbones.json
    python benchmarks/backbones.py --only roberta --serve  # also through the real Triton

Networks are made offline by the libraries' own configurations, tokenizers are trained on the spot (tests/conftest.py).
Each pair is exported with both operators, gate included, and its predictions on 200 texts in five languages, or 40
images, are compared with PyTorch's: label, rationale, probabilities to 1e-4; gathered states with attended ones.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

import numpy as np
import torch
from conftest import SENTENCES, encoder_settings, trained_tokenizer

from rekd_deploy import Client, Pipeline, TritonServer
from rekd_deploy.bench.results import hardware, versions
from rekd_deploy.export.run import publish
from rekd_train.checkpoints.checkpoint import save
from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.errors import RekdError
from rekd_train.files import write_json
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models.base import Predictor, Selector
from rekd_train.models.families import build_backbone
from rekd_train.models.gates import kept_positions, selection_scores
from rekd_train.models.rationalizer import Rationalizer

RESULTS = ROOT / "benchmarks" / "results" / "backbones.json"
TEXT = {
    "bert": "word pieces", "electra": "word pieces", "distilbert": "word pieces", "ernie": "word pieces",
    "nomic_bert": "word pieces", "mpnet": "word pieces", "roformer": "word pieces", "roberta": "byte-level BPE",
    "modernbert": "byte-level BPE", "deberta": "byte-level BPE", "eurobert": "start token alone",
    "xlm-roberta": "unigram", "camembert": "unigram", "albert": "unigram", "deberta-v2": "unigram",
}  # fmt: skip
_TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
IMAGE = {
    "vit_tiny_patch16_224": ("start", _TINY), "deit3_small_patch16_224": ("start", _TINY),
    "vit_small_patch14_reg4_dinov2": ("start", _TINY), "vit_small_patch16_dinov3": ("mean", _TINY),
    "vit_base_patch16_clip_224": ("start", _TINY), "vit_base_patch16_siglip_224": ("attention", _TINY),
    "eva02_tiny_patch14_224": ("mean", _TINY), "beit_base_patch16_224": ("mean", _TINY),
    "swin_tiny_patch4_window7_224": (
        "mean", {"window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    ),
    "resnet18": ("mean", {}),
}  # fmt: skip
"""What each network's classifier reads, and arguments that make it tiny."""


def pair_over(kind: str, operator: str) -> Rationalizer:
    """A random pair whose scores and classes differ from input to input."""
    torch.manual_seed(0)
    if kind in TEXT:
        preprocessor = TextPreprocessor(trained_tokenizer(TEXT[kind]), TextSettings(64, (32,)))
        settings, width = encoder_settings(kind, preprocessor.vocabulary_size), 16
    else:
        pooling, arguments = IMAGE[kind]
        patch = 14 if "patch14" in kind else 16
        image = ImageConfig(height=4 * patch, width=4 * patch, patch=patch, channels=3)
        sized = {} if kind == "resnet18" else {"img_size": 4 * patch}
        width = 512 if kind == "resnet18" else 32 if "swin" in kind else 48
        settings = BackboneConfig(
            family="timm", width=width, heads=1, pooling=pooling, image=image,
            architecture={"name": kind, "arguments": {**sized, **arguments}},
        )  # fmt: skip
        preprocessor = ImagePreprocessor(ImageSettings.of(settings))
    selector = Selector(build_backbone(settings, preprocessor.special_ids))
    predictor = Predictor(build_backbone(settings, preprocessor.special_ids), 2, operator)
    with torch.no_grad():
        for module in (selector, predictor):
            for name, parameter in module.backbone.named_parameters():
                if kind in IMAGE and parameter.dim() > 1:
                    torch.nn.init.xavier_normal_(parameter)
                elif "gamma" in name:  # some start with blocks that add next to nothing
                    torch.nn.init.ones_(parameter)
            module.head[-1].weight.mul_(8)
    policy = SelectionPolicy(bias=0.0, budget=0.25, minimum=1)
    pair = Rationalizer(selector, predictor, policy, preprocessor, ("negative", "positive")).eval()
    with torch.no_grad():  # scores of a random network lie close together: as far apart as a trained one's
        inputs = {name: torch.from_numpy(array) for name, array in preprocessor(items_for(kind)[:20]).inputs.items()}
        scores, last = selection_scores(pair.selector_logits(inputs))[pair.selectable(inputs)], selector.head[-1]
        last.weight.mul_(4 / scores.std())
        last.bias.copy_(torch.stack([4 * scores.mean() / scores.std(), torch.zeros(())]))
    return pair


def items_for(kind: str) -> list:
    """200 texts that mix five scripts, or 40 images."""
    generator = random.Random(0)
    if kind in IMAGE:
        side = 4 * (14 if "patch14" in kind else 16)
        return list(np.random.default_rng(0).integers(0, 256, (40, side, side, 3), dtype=np.uint8))
    return [" ".join(generator.choices(SENTENCES, k=generator.randint(1, 6))) for _ in range(200)]


@torch.no_grad()
def apart(pair: Rationalizer, items: list) -> float:
    """How far gathered states are from attended ones on the rationales of 40 items, as a share of the largest state."""
    inputs = {name: torch.from_numpy(array) for name, array in pair.preprocessor(items[:40]).inputs.items()}
    mask = pair.select(inputs).mask
    attended = pair.predictor.backbone.attended(inputs, mask)
    gathered = pair.predictor.backbone.gathered(inputs, *kept_positions(mask, pair.capacity))
    return float((gathered - attended).abs().max() / attended.abs().max())


def agreeing(answers: list, expected: list) -> int:
    """How many predictions are the same: label, rationale, and probabilities to 1e-4."""
    same = 0
    for mine, theirs in zip(answers, expected, strict=True):
        places = [[(part.start, part.end) if hasattr(part, "start") else part.box for part in each.rationale]
                  for each in (mine, theirs)]  # fmt: skip
        close = all(abs(mine.probabilities[name] - theirs.probabilities[name]) <= 1e-4 for name in mine.probabilities)
        same += mine.label == theirs.label and places[0] == places[1] and close
    return same


def tried(kind: str, serve: bool, folder: Path) -> dict:
    """One row of the table."""
    row: dict = {"modality": "text" if kind in TEXT else "image", "tokenizer": TEXT.get(kind), "exported": {}}
    items = items_for(kind)
    for operator in ("compact", "zero"):
        try:
            pair = pair_over(kind, operator)
        except RekdError as error:
            row["refused"] = {operator: str(error)}
            continue
        if operator == "compact":
            row["gathering"] = pair.predictor.backbone.traits.gathering if kind in TEXT else "exact"
            row["apart"] = apart(pair, items)
        repository = folder / f"{kind}-{operator}"
        publish(save(pair, folder / f"{kind}-{operator}-pair"), repository)
        expected = pair.predict(items)
        with Pipeline(repository) as pipeline:
            row["exported"][operator] = f"{agreeing(pipeline.predict(items), expected)} of {len(items)}"
        if serve and "served" not in row:
            with TritonServer(repository, 0, 0, 0) as server, Client(server.grpc_url) as client:
                row["served"] = f"{agreeing(client.predict(items), expected)} of {len(items)}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=[*TEXT, *IMAGE], default=[*TEXT, *IMAGE])
    parser.add_argument("--serve", action="store_true", help="ask the real Triton, too")
    options = parser.parse_args()
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.only:
            row = tried(kind, options.serve, Path(folder))
            result["rows"][kind] = row | {"command": " ".join(["python benchmarks/backbones.py", *sys.argv[1:]])}
            print(kind, row, flush=True)
            rows = {name: result["rows"][name] for name in (*TEXT, *IMAGE) if name in result["rows"]}
            write_json(RESULTS, {"hardware": hardware(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
