"""Data sets: from a name in the configuration to labelled examples in fixed splits, and to batches of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import SPLITS, DataSet, LabelledImages, LabelledTexts, check_data, summarise
from rekd_train.data.own import is_unsplit, load_whole, own_data
from rekd_train.data.published import aclimdb, cifar, digits, fashion_mnist, mosaic, packaged_reviews
from rekd_train.data.splits import ImageSplit, Split, TokenizedTexts, bucketed_batches, encode, encode_splits, tokenize

__all__ = [
    "SPLITS", "DataSet", "ImageSplit", "LabelledImages", "LabelledTexts", "Split", "TokenizedTexts", "bucketed_batches",
    "encode", "encode_splits", "is_unsplit", "load_data", "load_whole", "summarise", "tokenize",
]  # fmt: skip

SOURCES: dict[str, Callable[[DataConfig], DataSet]] = {
    "table": own_data, "image_folder": own_data, "hf": own_data,
    "imdb": packaged_reviews, "rotten_tomatoes": packaged_reviews, "aclimdb": aclimdb,
    "cifar10": cifar, "cifar100_coarse": cifar, "cifar100_fine": cifar,
    "fashion_mnist": fashion_mnist, "mosaic": mosaic, "digits": digits,
}  # fmt: skip
"""A reader for each name that ``data.name`` may have."""


def load_data(config: DataConfig) -> DataSet:
    """The data set that a configuration names, checked, with its limits applied.

    DataError: missing, damaged, or nothing that can be learnt from; names the file or row and the fix;
    MissingExtraError: a package that the source needs is not installed.
    """
    data = SOURCES[config.name](config)
    data = replace(data, splits={name: part.head(config.limits[name]) for name, part in data.splits.items()})
    if (count := config.labelled_examples) is not None:
        data = replace(data, splits=data.splits | {"train": data.splits["train"].unlabelled_from(count)})
    check_data(data, config.name)
    return data
