"""What every data set must be before a minute is spent on training with it."""

from __future__ import annotations

import numpy as np

from rekd_train.data.examples import DataSet
from rekd_train.errors import DataError


def check_data(data: DataSet, name: str) -> None:
    """Raise DataError that names every mistake: an empty split, one class only, labels beyond the classes.

    The splits may be encoded ones, too: their labels alone are looked at.
    """
    mistakes = []
    for split, examples in data.splits.items():
        if len(examples) == 0:
            mistakes.append(f"the split '{split}' is empty; fix: more examples")
            continue
        if len(examples) != len(examples.labels):
            counts = f"{len(examples)} examples and {len(examples.labels)} labels"
            mistakes.append(f"the split '{split}' has {counts}; fix: one label for each")
            continue
        low, high = int(examples.labels.min()), int(examples.labels.max())
        if low < 0 or high >= len(data.label_names):
            wrong = low if low < 0 else high
            mistakes.append(
                f"the split '{split}' has the label {wrong}; there are {len(data.label_names)} classes, "
                f"0 to {len(data.label_names) - 1}; fix: labels and class names that belong together"
            )
    if len(data.label_names) < 2 or len(np.unique(data.splits["train"].labels)) < 2:
        mistakes.append("the training examples are all of one class; fix: examples of at least two")
    if mistakes:
        raise DataError(f"data '{name}': " + "; ".join(mistakes))
