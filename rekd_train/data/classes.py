"""Label values -> class numbers, the same numbering in every split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def class_names(labels: Mapping[str, Sequence[str]], given: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of a data set: those given, or the training labels, sorted (whole numbers by value)."""
    return tuple(given) or tuple(sorted({label for label in labels["train"] if label}, key=_by_value))


def unknown_labels(labels: Sequence[str], names: Sequence[str], place: Callable[[int], str]) -> list[str]:
    """One problem for each label that is none of the classes; '' (missing) is left to others.

    Args:
        place: where the label of an index stands.
    """
    known = set(names)
    return [
        f"{place(index)}: the label '{label}' is none of the {len(known)} classes"
        for index, label in enumerate(labels) if label and label not in known
    ]  # fmt: skip


def label_fix(names: Sequence[str]) -> str:
    """The end of a message about unknown labels."""
    some = ", ".join(list(names)[:12]) + (", ..." if len(names) > 12 else "")
    return f"classes: {some}; fix: correct the labels, or list every class: --set 'data.labels=[\"a\", \"b\"]'"


def class_numbers(labels: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """(n,) int64 indices into ``names``, each label being one of them."""
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[label] for label in labels], dtype=np.int64)


def _by_value(label: str) -> tuple[float, str]:
    whole = label.removeprefix("-").isdecimal()
    return (float(label) if whole else float("inf"), label)
