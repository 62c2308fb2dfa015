"""Examples of the dev split that travel with a checkpoint, so that an export proves its parity on real inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rekd_train.checkpoint import IMAGES_FILE
from rekd_train.data import DataSet, LabelledTexts, encode
from rekd_train.errors import CheckpointError
from rekd_train.preprocessors import Preprocessor

TEXTS = 200
IMAGES = 64


def checkpoint_examples(data: DataSet, preprocessor: Preprocessor) -> dict[str, Any]:
    """Arguments for ``checkpoint.save``: ``examples`` for texts, ``images`` for images."""
    dev = data.splits["dev"]
    if isinstance(dev, LabelledTexts):
        some = dev.head(TEXTS)
        pairs = zip(some.texts, some.labels, strict=True)
        return {"examples": [{"text": text, "label": data.label_names[label]} for text, label in pairs]}
    split = encode(dev.head(IMAGES), preprocessor)
    return {"images": {"pixels": split.inputs(np.arange(len(split)))["pixels"], "labels": split.labels}}


def read_images(directory: Path) -> dict[str, np.ndarray] | None:
    """``pixels`` (n, H, W, C) uint8, in the size that the model takes, and ``labels`` (n,) int64 of a checkpoint.

    Returns:
        None if it carries no images.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(directory) / IMAGES_FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in ("pixels", "labels")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; fix: copy it again") from None
