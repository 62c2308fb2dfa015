"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8, for quick tests; nothing is fetched."""

from __future__ import annotations

import numpy as np

from rekd_train.config.run import DataConfig
from rekd_train.data.examples import DataSet, LabelledImages
from rekd_train.data.partition import completed
from rekd_train.errors import MissingExtraError


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
        splits=completed({"train": examples}, config.dev_share, config.test_share, config.seed),
        label_names=tuple(str(digit) for digit in range(10)),
        origin="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI; CC BY 4.0), as carried by "
        "scikit-learn",
    )
