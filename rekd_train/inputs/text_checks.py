"""Texts given for prediction: what cannot be used is named, all of it at once. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rekd_train.errors import Fault, FaultyItemsError, InputError

WORDLESS = Fault("holds no word that the tokenizer knows", "give at least one word")


def text_fault(text: object) -> Fault | None:
    """Why a text cannot be predicted on; None: it can."""
    if not isinstance(text, str):
        if isinstance(text, (Path, np.ndarray)) or type(text).__module__.startswith("PIL."):
            return Fault(f"is {type(text).__name__}, an image", "give this model texts (str); it reads no images")
        return Fault(f"is {type(text).__name__}", "give texts as str")
    if not text.strip():
        return Fault("is only white space" if text else "is empty", "give at least one word")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"has an unpaired surrogate at character {error.start + 1}; it is not valid Unicode"
        return Fault(what, "take that character out")
    return None


def check_texts(texts: object) -> list[str]:
    """Return ``texts`` as a list if every one can be predicted on.

    Raises:
        InputError: not a list, or an empty list.
        FaultyItemsError: texts that cannot be used.
    """
    texts = text_list(texts)
    refuse(text_faults(texts))
    return texts


def text_list(texts: object) -> list[str]:
    """``texts`` as a list, its elements unchecked; InputError: not a list, or an empty one."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise InputError(f"texts is {type(texts).__name__}; give a list of str")
    if len(texts) == 0:
        raise InputError("the list of texts is empty; give at least one text")
    return list(texts)


def text_faults(texts: Sequence[object]) -> dict[int, Fault]:
    """The faults by index, 0 for the first text."""
    return {index: fault for index, text in enumerate(texts) if (fault := text_fault(text))}


def refuse(faults: Mapping[int, Fault], first_index: int = 0) -> None:
    """Raise FaultyItemsError if there are faults; messages count from 1, so "text 1" is the first one of the call.

    Args:
        faults: by index in a part of the call.
        first_index: of the part's first text in the call.
    """
    if faults:
        raise FaultyItemsError(
            {first_index + index: fault for index, fault in sorted(faults.items())}, lambda index: f"text {index + 1}"
        )
