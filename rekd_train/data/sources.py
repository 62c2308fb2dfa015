"""The registry of data sets: from a configuration to checked examples in three splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rekd_train.config.run import DataConfig
from rekd_train.data.checks import check_data
from rekd_train.data.cifar import cifar
from rekd_train.data.digits import digits
from rekd_train.data.examples import DataSet, Examples
from rekd_train.data.fashion import fashion_mnist
from rekd_train.data.folders import every_image, image_folder, without_splits
from rekd_train.data.imdb import aclimdb, imdb, rotten_tomatoes
from rekd_train.data.mosaic import mosaic
from rekd_train.data.tables import every_row, table

SOURCES: dict[str, Callable[[DataConfig], DataSet]] = {
    "imdb": imdb,
    "aclimdb": aclimdb,
    "rotten_tomatoes": rotten_tomatoes,
    "table": table,
    "cifar10": cifar,
    "cifar100_coarse": cifar,
    "cifar100_fine": cifar,
    "fashion_mnist": fashion_mnist,
    "mosaic": mosaic,
    "digits": digits,
    "image_folder": image_folder,
}
"""A reader for each name that ``data.name`` may have."""


def load_data(config: DataConfig) -> DataSet:
    """The data set that a configuration names, checked, with its limits applied.

    Raises:
        DataError: missing, damaged, or nothing that can be learnt from; names the file or row and the fix.
        MissingExtraError: a package that the source needs is not installed.
    """
    data = SOURCES[config.name](config)
    data = data.limited(
        {"train": config.train_examples, "dev": config.dev_examples, "test": config.test_examples}
    )
    check_data(data, config.name)
    return data


def is_unsplit(config: DataConfig) -> bool:
    """Whether the data are one file of the user's, or one folder of images, that says nothing of splits."""
    path = Path(config.path)
    if config.name == "table":
        return path.is_file() and not config.split_column
    return config.name == "image_folder" and path.is_dir() and without_splits(path)


def load_whole(config: DataConfig, names: Sequence[str]) -> Examples:
    """Every example of such data, duplicates and all: to measure a model on.

    Args:
        names: the model's classes, in the order of the logits.

    Raises:
        DataError: as ``load_data``; labels that are none of the classes.
    """
    return every_row(config, names) if config.name == "table" else every_image(config, names)
