"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 60,000 colour images, 32 x 32, from torchvision's files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import DataSet, LabelledImages
from rekd_train.data.partition import completed
from rekd_train.errors import DataError

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
        splits=completed(parts, config.dev_share, config.test_share, config.seed),
        label_names=tuple(names),
        origin=f"{base.upper().replace('R1', 'R-1')} (Krizhevsky 2009; published without a licence, research use)",
    )


def _trusted_pickle(path: Path) -> dict:
    """A file whose digest torchvision has just compared with the published one."""
    with open(path, "rb") as file:
        return pickle.load(file, encoding="latin1")
