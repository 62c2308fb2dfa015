"""Mosaics with a known reason: one tile is a Fashion-MNIST item and decides the label, the others are noise.

The noise tiles are other items of nearly the same brightness with their pixels shuffled, so that neither
brightness nor the distribution of grey values gives the item's place away.
"""

from __future__ import annotations

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import DataSet, LabelledImages
from rekd_train.data.fashion import LABELS, ORIGIN, official_parts
from rekd_train.data.partition import completed

NEIGHBOURS = 100
"""A noise tile is made from one of so many items next in brightness, on either side."""


def mosaic(config: DataConfig) -> DataSet:
    """``data.tiles`` x ``data.tiles`` mosaics, one for each item; the tiles of a split come from that split alone.

    With ``data.other_tiles`` = 'blank' the noise is left out (black): the same task for a model that is
    shown where to look, an upper bound.

    Raises:
        DataError: the Fashion-MNIST files are not there or damaged.
    """
    parts = completed(official_parts(config), config.dev_share, config.test_share, config.seed)
    limits = {"train": config.train_examples, "dev": config.dev_examples, "test": config.test_examples}
    splits = {
        name: make_mosaics(items, config.tiles, np.random.default_rng([config.seed, place]), limits[name],
                           blank=config.other_tiles == "blank")
        for place, (name, items) in enumerate(parts.items())
    }  # fmt: skip
    others = "the other tiles are black" if config.other_tiles == "blank" else "the other tiles are shuffled items"
    return DataSet(splits, LABELS, f"{ORIGIN}, put into {config.tiles} x {config.tiles} mosaics; {others}")


def make_mosaics(
    items: LabelledImages, tiles: int, generator: np.random.Generator, count: int | None = None, *, blank: bool = False
) -> LabelledImages:
    """Mosaics of the first ``count`` items, each with the region of its item.

    Args:
        items: images (n, side, side, 1).
        tiles: tiles in each row and column.
        generator: decides places, noise items and their shuffling.
        blank: leave the other tiles black.
    """
    shown = items.head(count)
    size, side = len(shown), items.images.shape[1]
    others = tiles * tiles - 1
    places = generator.integers(0, tiles * tiles, size=size)
    grid = np.zeros((size, tiles * tiles, side * side), dtype=np.uint8)
    if not blank:
        noise = _alike(items.images, size, others, generator)
        free = np.argsort(np.arange(tiles * tiles) == places[:, None], axis=1, kind="stable")[:, :others]
        for column in range(others):  # one at a time: the shuffling copies what it is given
            pixels = items.images[noise[:, column]].reshape(size, -1)
            grid[np.arange(size), free[:, column]] = generator.permuted(pixels, axis=1)
    grid[np.arange(size), places] = shown.images.reshape(size, -1)
    rows, columns = np.divmod(places, tiles)
    regions = np.stack([rows, columns, rows + 1, columns + 1], axis=1) * side
    images = grid.reshape(size, tiles, tiles, side, side).transpose(0, 1, 3, 2, 4)
    return LabelledImages(images.reshape(size, tiles * side, tiles * side, 1), shown.labels, regions)


def _alike(images: np.ndarray, size: int, others: int, generator: np.random.Generator) -> np.ndarray:
    """(size, others) indices of items close in brightness to each of the first ``size``, never itself."""
    brightness = images.reshape(len(images), -1).mean(axis=1)
    order = np.argsort(brightness, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    reach = max(1, min(NEIGHBOURS, (len(order) - 1) // 2))
    steps = generator.integers(1, reach + 1, size=(size, others)) * generator.choice([-1, 1], size=(size, others))
    wanted = rank[:size, None] + steps
    inside = (wanted >= 0) & (wanted < len(order))  # at the darkest and brightest end there is one side only
    return order[np.where(inside, wanted, rank[:size, None] - steps)]
