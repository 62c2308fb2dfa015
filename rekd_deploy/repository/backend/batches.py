"""Requests of several lengths as one batch, and its answers by request again.

This file is copied beside ``model.py``, see ``triton_model``; it needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Arrays = dict[str, np.ndarray]

MOST_PADDING = 1.25
"""Texts that run as one batch: the longest has at most this many times the length of the shortest. On a CPU padding
costs as much as text, and a larger batch saves little: benchmarks/results/serving_batching.json."""
_AS_LONG_AS_THE_TEXT = ("scores", "mask", "keep")
"""Outputs with a column for each token."""


def groups_by_length(inputs: Mapping[int, Arrays], most_padding: float = MOST_PADDING) -> list[list[int]]:
    """Indices of the requests, parted into batches of similar length: a long text makes no short one cost as much.

    Args:
        inputs: of each request by index.
        most_padding: the longest of a batch has at most this many times the length of the shortest.
    """
    if len(inputs) == 1:
        return [list(inputs)]
    lengths = {index: _text(arrays).shape[1] for index, arrays in inputs.items()}
    groups: list[list[int]] = []
    for index in sorted(inputs, key=lengths.__getitem__):
        if groups and lengths[index] <= most_padding * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _text(arrays: Arrays) -> np.ndarray:
    """The ids, whose axis 1 is the length, wherever the client put them; of an image its pixels."""
    return arrays.get("input_ids", next(iter(arrays.values())))


def joined(requests: Sequence[Arrays], pad_id: int = 0) -> Arrays:
    """The requests' arrays one below the other, right-padded to the longest: ids with ``pad_id``, all else with 0."""
    if len(requests) == 1:
        return requests[0]
    return {
        name: _stacked([arrays[name] for arrays in requests], pad_id if name == "input_ids" else 0)
        for name in requests[0]
    }


def _stacked(arrays: Sequence[np.ndarray], filler: int) -> np.ndarray:
    widest = max(array.shape[1] for array in arrays)
    if all(array.shape[1] == widest for array in arrays):
        return np.concatenate(arrays)
    result = np.full((sum(map(len, arrays)), widest), filler, arrays[0].dtype)
    start = 0
    for array in arrays:
        result[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return result


def split_rows(outputs: Sequence[np.ndarray], names: Sequence[str], requests: Sequence[Arrays]) -> list[Arrays]:
    """Undo ``joined`` on the outputs: one dictionary a request, of its own rows and, token by token, its own length.

    The slots of a hand-over (``positions``, ``kept``) stay as many as the longest text of the batch has.
    """
    if len(requests) == 1:
        return [dict(zip(names, outputs, strict=True))]
    answers, start = [], 0
    for arrays in requests:
        text = _text(arrays)
        end, length = start + len(text), text.shape[1] if "input_ids" in arrays else None
        answers.append({
            name: np.ascontiguousarray(array[start:end, : length if name in _AS_LONG_AS_THE_TEXT else None])
            for name, array in zip(names, outputs, strict=True)
        })
        start = end
    return answers
