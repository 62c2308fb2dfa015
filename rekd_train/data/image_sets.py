"""Published image sets: digits, CIFAR, Fashion-MNIST, and mosaics of the last with a known reason."""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import DataSet, LabelledImages, completed
from rekd_train.errors import DataError, MissingExtraError


def digits(config: DataConfig) -> DataSet:
    """The digits in a stratified split.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("scikit-learn", "data") from None
    loaded = load_digits()
    pixels = np.round(loaded.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    examples = LabelledImages(pixels, loaded.target.astype(np.int64))
    return DataSet(
        splits=completed({"train": examples}, config),
        label_names=tuple(str(digit) for digit in range(10)),
        origin="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI; CC BY 4.0), as carried by "
        "scikit-learn",
    )


_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def cifar(config: DataConfig) -> DataSet:
    """50,000 images split into train and dev, and the official 10,000 as test.

    'cifar10', 'cifar100_coarse' (20 superclasses, the paper's "CIFAR-100") or 'cifar100_fine' (100 classes).

    Raises:
        DataError: the files are not at ``data.path`` or not the published ones.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    base, _, granularity = config.name.partition("_")
    published = CIFAR10 if base == "cifar10" else CIFAR100
    folder = _FOLDERS[base]
    fix = f"fix: unpack the python version of {base.upper().replace('R1', 'R-1')} and give the folder that holds " \
          f"{folder}: --set data.path=DIR"  # fmt: skip
    if not config.path:
        raise DataError(f"data '{config.name}' is not fetched from the network; {fix}")
    root = Path(config.path)
    root = root.parent if root.name == folder else root
    parts = {}
    for split in ("train", "test"):
        try:
            loaded = published(str(root), train=split == "train", download=False)
        except RuntimeError:  # torchvision compares every file with its published digest
            raise DataError(f"{root / folder} is missing, incomplete or not the published files; {fix}") from None
        labels = loaded.targets
        if granularity == "coarse":
            labels = _trusted_pickle(root / folder / split)["coarse_labels"]
        parts[split] = LabelledImages(loaded.data, np.array(labels, dtype=np.int64))
    names = loaded.classes
    if granularity == "coarse":
        names = _trusted_pickle(root / folder / "meta")["coarse_label_names"]
    return DataSet(
        splits=completed(parts, config),
        label_names=tuple(names),
        origin=f"{base.upper().replace('R1', 'R-1')} (Krizhevsky 2009; published without a licence, research use)",
    )


def _trusted_pickle(path: Path) -> dict:
    """A file whose digest torchvision has just compared with the published one."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")


LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
ORIGIN = "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, Zalando SE; MIT)"
_FIX = "fix: apt-get install dataset-fashion-mnist, or give the folder of its IDX files: --set data.path=DIR"
_PREFIXES = {"train": "train", "test": "t10k"}


def fashion_mnist(config: DataConfig) -> DataSet:
    """60,000 images split into train and dev, and the official 10,000 as test.

    Raises:
        DataError: the files are not there or damaged.
    """
    return DataSet(completed(official_parts(config), config), LABELS, ORIGIN)


def official_parts(config: DataConfig) -> dict[str, LabelledImages]:
    """'train' and 'test' as published, from ``data.path`` or Debian's package."""
    folder = Path(config.path) if config.path else DEBIAN_FOLDER
    parts = {}
    for split, prefix in _PREFIXES.items():
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels for '{split}'; {_FIX}")
        parts[split] = LabelledImages(images[:, :, :, None], labels.astype(np.int64))
    return parts


def _read_idx(folder: Path, name: str, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not."""
    packed, raw = folder / f"{name}.gz", folder / name
    path = raw if raw.is_file() else packed
    try:
        content = gzip.decompress(path.read_bytes()) if path is packed else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"Fashion-MNIST is not at {folder}: {name}.gz is missing; {_FIX}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); {_FIX}") from None
    header = 4 + 4 * axes
    if len(content) < header or content[:4] != bytes([0, 0, 8, axes]):
        raise DataError(f"{path} is no IDX file of bytes with {axes} axes; {_FIX}")
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise DataError(f"{path} is cut off: {len(content) - header} of {int(np.prod(shape))} bytes; {_FIX}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


NEIGHBOURS = 100
"""A noise tile is made from one of so many items next in brightness, on either side."""


def mosaic(config: DataConfig) -> DataSet:
    """``data.tiles`` x ``data.tiles`` mosaics, one for each item; the tiles of a split come from that split alone.

    With ``data.other_tiles`` = 'blank' the noise is left out (black): the same task for a model that is
    shown where to look, an upper bound.

    Raises:
        DataError: the Fashion-MNIST files are not there or damaged.
    """
    parts = completed(official_parts(config), config)
    splits = {
        name: make_mosaics(items, config.tiles, np.random.default_rng([config.seed, place]), config.limits[name],
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
