"""Toy tasks with a planted signal: one word or one patch tells the class."""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import WORDS, make_image_rationalizer, make_rationalizer

from rekd_train.checkpoints.checkpoint import save
from rekd_train.cli.command import run
from rekd_train.cli.main import app
from rekd_train.config.run import RunConfig
from rekd_train.data import ImageSplit, LabelledTexts, tokenize
from rekd_train.models.base import Selector
from rekd_train.models.families import build_backbone
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.stages import fit
from rekd_train.training.state import Observer


class ToyTexts:
    """Texts of neutral words and one of 'good', 'bad'."""

    @staticmethod
    def words(examples: int, seed: int) -> tuple[list[str], np.ndarray]:
        random = np.random.default_rng(seed)
        neutral = [word for word in WORDS if word not in ("good", "bad")]
        labels, texts = np.arange(examples) % 2, []
        for label in labels:
            words = list(random.choice(neutral, size=random.integers(6, 20)))
            words.insert(int(random.integers(len(words))), ("bad", "good")[label])
            texts.append(" ".join(words))
        return texts, labels

    @staticmethod
    def split(pair: Rationalizer, examples: int, seed: int):
        return tokenize(LabelledTexts(*ToyTexts.words(examples, seed)), pair.preprocessor)


def image_split(pair: Rationalizer, examples: int, seed: int, augmented: bool = False) -> ImageSplit:
    """Grey 16 x 12 images of noise; one 4 x 4 patch is all dark, striped or bright."""
    random, labels = np.random.default_rng(seed), np.arange(examples) % 3
    pixels = random.integers(110, 146, size=(examples, 16, 12, 1)).astype(np.uint8)
    stripes = np.tile([[0], [255]], (2, 4))
    for index, label in enumerate(labels):
        row, column = random.integers(4) * 4, random.integers(3) * 4
        pixels[index, row : row + 4, column : column + 4, 0] = (0, stripes, 255)[label]
    return ImageSplit(pixels, labels, pair.preprocessor, augmentation="flip" if augmented else "none")


def toy_config(**changes) -> RunConfig:
    """A quick run; ``changes`` as ``section={"key": value}``."""
    document = {
        "name": "toy", "seed": 3, "data": {"max_length": 48},
        "selection": {"target": 0.15, "budget": 0.3, "minimum": 1},
        "optimisation": {"batch_size": 32, "learning_rate": 5e-3, "warmup": 0.0},
        "stages": {"classifier_epochs": 2, "rationale_epochs": 2, "compact_epochs": 1, "evaluate_every": 0},
    }  # fmt: skip
    for section, values in changes.items():
        document[section] = document.get(section, {}) | values if isinstance(values, dict) else values
    return RunConfig.model_validate(document)


def toy_texts(seed: int = 0, examples: int = 256, labels=("negative", "positive"), **sizes):
    pair = plain(make_rationalizer(seed, operator="zero", labels=labels), **sizes)
    return pair, ToyTexts.split(pair, examples, 1), ToyTexts.split(pair, 64, 2)


def toy_images(seed: int = 0, examples: int = 256, augmented: bool = False):
    pair = plain(make_image_rationalizer(seed, operator="zero"))
    return pair, image_split(pair, examples, 1, augmented), image_split(pair, 64, 2)


def plain(pair: Rationalizer, equal: bool = False) -> Rationalizer:
    """The fixtures' pair with heads of the usual size, with ``equal`` also a selector of the predictor's size."""
    if equal:
        pair.selector = Selector(build_backbone(pair.predictor.backbone.settings, pair.preprocessor.special_ids))
    with torch.no_grad():
        pair.selector.head[-1].weight.div_(1 if equal else 8)
        pair.predictor.head[-1].weight.div_(20)
    return pair


def recorded_pair(folder: Path, **config) -> Path:
    """The checkpoint of a random pair that records a run on a small table beside it."""
    rows = [f"{text},{('bad', 'good')[label]}" for text, label in zip(*ToyTexts.words(80, 0), strict=True)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]))
    pair = make_rationalizer(labels=("bad", "good"))
    sizes = {role: getattr(pair, role).backbone.settings.model_dump() for role in ("selector", "predictor")}
    data = {"name": "table", "path": str(folder / "texts.csv")}
    recorded = toy_config(**{"data": data, **sizes, **config}).model_dump()
    return save(pair, folder / "pair", training={"name": "toy", "config": recorded})


class Recorder(Observer):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.values, self.evaluations = defaultdict(list), defaultdict(list)
        """By the stage's name."""
        self.notes: list[str] = []

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self.stages.append((name, steps, start))

    def step(self, values: dict[str, float]) -> None:
        if values:
            self.values[self.stages[-1][0]].append(values)

    def evaluated(self, values: dict[str, float]) -> None:
        self.evaluations[self.stages[-1][0]].append(values)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def losses(self, stage: str, name: str = "loss") -> list[float]:
        return [values[name] for values in self.values[stage]]


def rekd_train(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run(app, [str(argument) for argument in arguments])
    return end.value.code or 0


def fitted(made=None, *, options=(), **changes):
    """(the pair, what its training was told) of (pair, train, dev); ``options`` of ``fit``, ``changes`` of the run."""
    (pair, train, dev), given = made or toy_texts(), {"observer": Recorder()} | dict(options)
    fit(toy_config(**changes), pair, train, dev, **given)
    return pair, given["observer"]
