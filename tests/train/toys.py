"""Toy tasks with a planted signal: one word or one patch tells the class."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import WORDS, make_image_rationalizer, make_rationalizer

from rekd_train.cli.command import run
from rekd_train.cli.main import app
from rekd_train.config.run import RunConfig
from rekd_train.models.rationalizer import Rationalizer


class ToyTexts:
    """Texts of neutral words and one of 'good', 'bad'."""

    augmented = False

    def __init__(self, pair: Rationalizer, examples: int, seed: int) -> None:
        texts, self.labels = self.words(examples, seed)
        self.truth = None
        self.preprocessor = pair.preprocessor
        self._ids = [np.asarray(encoding.ids, dtype=np.int64) for encoding in pair.preprocessor.encode(texts)]
        self.lengths = np.array([len(ids) for ids in self._ids])

    @staticmethod
    def words(examples: int, seed: int) -> tuple[list[str], np.ndarray]:
        """(texts, labels)."""
        random = np.random.default_rng(seed)
        neutral = [word for word in WORDS if word not in ("good", "bad")]
        labels, texts = np.arange(examples) % 2, []
        for label in labels:
            words = list(random.choice(neutral, size=random.integers(6, 20)))
            words.insert(int(random.integers(len(words))), ("bad", "good")[label])
            texts.append(" ".join(words))
        return texts, labels

    def __len__(self) -> int:
        return len(self._ids)

    def inputs(self, indices, generator=None) -> dict[str, np.ndarray]:
        rows = [self._ids[index] for index in indices]
        return self.preprocessor.pad(rows, max(len(row) for row in rows))


class ToyImages:
    """Grey 16 x 12 images of noise; one 4 x 4 patch is all dark, striped or bright."""

    def __init__(self, pair: Rationalizer, examples: int, seed: int, augmented: bool = False) -> None:
        random = np.random.default_rng(seed)
        self.labels = np.arange(examples) % 3
        self.pixels = random.integers(110, 146, size=(examples, 16, 12, 1)).astype(np.uint8)
        stripes = np.tile([[0], [255]], (2, 4))
        for index, label in enumerate(self.labels):
            row, column = random.integers(4) * 4, random.integers(3) * 4
            self.pixels[index, row : row + 4, column : column + 4, 0] = (0, stripes, 255)[label]
        self.augmented, self.truth = augmented, None
        self.lengths = np.full(examples, 12)

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self, indices, generator=None) -> dict[str, np.ndarray]:
        pixels = self.pixels[indices]
        if generator is not None:
            pixels = pixels + generator.integers(0, 8, size=pixels.shape).astype(np.uint8) * (pixels < 200)
        return {"pixels": np.ascontiguousarray(pixels)}


def toy_config(**changes) -> RunConfig:
    """A quick run; ``changes`` as ``section={"key": value}``."""
    document = {
        "name": "toy",
        "seed": 3,
        "data": {"max_length": 48},
        "selection": {"target": 0.15, "budget": 0.3, "minimum": 1},
        "optimisation": {"batch_size": 32, "learning_rate": 5e-3, "warmup": 0.0},
        "stages": {"classifier_epochs": 2, "rationale_epochs": 2, "compact_epochs": 1, "evaluate_every": 0},
    }
    for section, values in changes.items():
        document[section] = document.get(section, {}) | values if isinstance(values, dict) else values
    return RunConfig.model_validate(document)


def toy_texts(seed: int = 0, examples: int = 256, labels=("negative", "positive"), **sizes):
    """(pair, train, dev) on texts."""
    pair = plain(make_rationalizer(seed, operator="zero", labels=labels), **sizes)
    return pair, ToyTexts(pair, examples, 1), ToyTexts(pair, 64, 2)


def toy_images(seed: int = 0, examples: int = 256, augmented: bool = False):
    """(pair, train, dev) on images."""
    pair = plain(make_image_rationalizer(seed, operator="zero"))
    return pair, ToyImages(pair, examples, 1, augmented), ToyImages(pair, 64, 2)


def plain(pair: Rationalizer, equal: bool = False) -> Rationalizer:
    """The fixtures' pair with heads of the usual size, with ``equal`` also a selector of the predictor's size."""
    if equal:
        from rekd_train.models.base import Selector
        from rekd_train.models.families import build_backbone

        settings = pair.predictor.backbone.settings
        pair.selector = Selector(build_backbone(settings, pair.preprocessor.special_ids))
    else:
        with torch.no_grad():
            pair.selector.head[-1].weight.div_(8)
    with torch.no_grad():
        pair.predictor.head[-1].weight.div_(20)
    return pair


class Recorder:
    """Remembers everything it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.values: dict[str, list[dict[str, float]]] = {}
        self.evaluations: dict[str, list[dict[str, float]]] = {}
        self.summary: dict = {}

    def data(self, summary: dict) -> None:
        self.summary = summary

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self.stages.append((name, steps, start))
        self.values[name], self.evaluations[name] = [], []

    def step(self, values: dict[str, float]) -> None:
        if values:
            self.values[self.stages[-1][0]].append(values)

    def evaluated(self, values: dict[str, float]) -> None:
        self.evaluations[self.stages[-1][0]].append(values)

    def losses(self, stage: str, name: str = "loss") -> list[float]:
        return [values[name] for values in self.values[stage]]


def rekd_train(*arguments: object) -> int:
    """Runs the command; its exit code."""
    with pytest.raises(SystemExit) as end:
        run(app, [str(argument) for argument in arguments])
    return end.value.code or 0
