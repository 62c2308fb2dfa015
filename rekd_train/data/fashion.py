"""Fashion-MNIST (Xiao et al. 2017): 70,000 grey images, 28 x 28, of ten kinds of clothing, from its IDX files."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import DataSet, LabelledImages
from rekd_train.data.partition import completed
from rekd_train.errors import DataError

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
    return DataSet(
        splits=completed(official_parts(config), config.dev_share, config.test_share, config.seed),
        label_names=LABELS,
        origin=ORIGIN,
    )


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
