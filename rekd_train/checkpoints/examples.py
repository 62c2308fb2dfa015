"""Examples of the dev split that travel with a checkpoint, so that an export proves its parity on real inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from rekd_train.data import DataSet, LabelledTexts, encode
from rekd_train.inputs.preprocessors import Preprocessor

TEXTS = 200
IMAGES = 200
IMAGE_BYTES = 8_000_000
"""Large images are fewer: a checkpoint should stay a file to send."""


def checkpoint_examples(data: DataSet, preprocessor: Preprocessor) -> dict[str, Any]:
    """Arguments for ``checkpoint.save``: ``examples`` for texts, ``images`` for images."""
    dev = data.splits["dev"]
    if isinstance(dev, LabelledTexts):
        some = dev.head(TEXTS)
        pairs = zip(some.texts, some.labels, strict=True)
        return {"examples": [{"text": text, "label": data.label_names[label]} for text, label in pairs]}
    settings = preprocessor.settings
    fitting = IMAGE_BYTES // (settings.height * settings.width * settings.channels)
    split = encode(dev.head(max(16, min(IMAGES, fitting))), preprocessor)
    return {"images": {"pixels": split.inputs(np.arange(len(split)))["pixels"], "labels": split.labels}}
