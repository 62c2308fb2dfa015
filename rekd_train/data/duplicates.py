"""Examples that occur twice: each is kept once, so that none that measures was trained on, and conflicts are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rekd_train.data.examples import SPLITS


@dataclass(frozen=True)
class Duplicates:
    """What was found among the examples of all splits."""

    kept: dict[str, list[int]]
    """By split, the rows to keep, in their order."""
    dropped: int
    contradictions: tuple[str, ...]
    """One entry for each example that occurs with different labels: its places and labels, the kept one first."""


def find_duplicates(
    keys: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence[str]],
    place: Callable[[str, int], str],
    shown: Callable[[str], str] = lambda key: "",
) -> Duplicates:
    """Keep each example once: in 'test' before 'dev' before 'train', and within a split the first one.

    Args:
        keys: by split, what tells examples apart: a text, or the digest of an image.
        labels: by split, as many.
        place: where the row of a split stands, for messages.
        shown: what messages say of a key.
    """
    first: dict[str, tuple[str, int]] = {}
    others: dict[str, list[tuple[str, int]]] = {}
    kept: dict[str, list[int]] = {}
    for split in (name for name in reversed(SPLITS) if name in keys):
        kept[split] = []
        for row, key in enumerate(keys[split]):
            where = first.setdefault(key, (split, row))
            if where == (split, row):
                kept[split].append(row)
            elif labels[split][row] != labels[where[0]][where[1]]:
                others.setdefault(key, []).append((split, row))
    contradictions = []
    for key, places in others.items():
        named = [f"{place(*where)} '{labels[where[0]][where[1]]}'" for where in (first[key], *places)]
        contradictions.append(f"{named[0]} (kept), {', '.join(named[1:])}{shown(key)}")
    dropped = sum(map(len, keys.values())) - sum(map(len, kept.values()))
    return Duplicates(kept, dropped, tuple(contradictions))
