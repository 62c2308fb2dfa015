"""Label values -> class numbers, the same numbering in every split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rekd_train.errors import DataError


def class_names(labels: Mapping[str, Sequence[str]], given: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of a data set: those given, or the training labels, sorted (whole numbers by value)."""
    return tuple(given) or tuple(sorted(set(labels["train"]), key=_by_value))


def class_numbers(labels: Sequence[str], names: Sequence[str], places: Sequence[str]) -> np.ndarray:
    """(n,) int64 indices into ``names``.

    Args:
        places: where each label stands, for the message.

    Raises:
        DataError: a label that is none of the classes.
    """
    numbers = {name: number for number, name in enumerate(names)}
    for label, place in zip(labels, places, strict=True):
        if label not in numbers:
            raise DataError(
                f"{place}: the label '{label}' is none of the {len(numbers)} classes ({', '.join(list(names)[:12])}); "
                "fix: correct it, or list every class: --set 'data.labels=[\"a\", \"b\"]'"
            )
    return np.array([numbers[label] for label in labels], dtype=np.int64)


def _by_value(label: str) -> tuple[float, str]:
    whole = label.removeprefix("-").isdecimal()
    return (float(label) if whole else float("inf"), label)
