"""What a run learns from, in figures: for the screen before training, for metrics.json and for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rekd_train.data.examples import DataSet
from rekd_train.data.splits import Split, TokenizedTexts

SHOWN = 20
"""Contradictions that are listed, and classes that a table shows."""
_UNEVEN = 10
"""A class with so many times the examples of another one makes accuracy blind for that one."""


def summarise(data: DataSet, splits: Mapping[str, Split]) -> dict[str, Any]:
    """JSON values: by split ``examples``, ``classes`` (examples of each), for texts ``tokens`` and ``cut``; and more.

    ``tokens`` are those of the whole texts (p5, p50, p95, max), specials included; ``cut`` counts the texts that are
    longer than ``max_length``. ``duplicates_dropped`` is None where nobody has looked for any; ``contradicting``
    counts the examples that occur with different labels, ``contradictions`` lists twenty of them.
    """
    summary: dict[str, Any] = {"splits": {}}
    for name, split in splits.items():
        counts = np.bincount(split.labels, minlength=len(data.label_names)).tolist()
        found = {"examples": len(split), "classes": dict(zip(data.label_names, counts, strict=True))}
        if isinstance(split, TokenizedTexts) and split.whole_lengths is not None:
            low, middle, high = np.percentile(split.whole_lengths, (5, 50, 95)).astype(int).tolist()
            found["tokens"] = {"p5": low, "p50": middle, "p95": high, "max": int(split.whole_lengths.max())}
            found["cut"] = int((split.whole_lengths > split.lengths).sum())
            summary["max_length"] = split.preprocessor.positions
        summary["splits"][name] = found
    return summary | {
        "duplicates_dropped": data.duplicates,
        "contradicting": len(data.contradictions),
        "contradictions": list(data.contradictions[:SHOWN]),
    }


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table: what is counted, and its figure in each split."""
    splits = list(summary["splits"].values())
    names = list(splits[0]["classes"])
    shown = names if len(names) <= SHOWN else names[: SHOWN - 1]
    rows = [("examples", *(f"{split['examples']:,}" for split in splits))]
    rows += [(f"class {name}", *(_part(split["classes"][name], split) for split in splits)) for name in shown]
    if len(shown) < len(names):
        rest = [sum(split["classes"][name] for name in names[len(shown) :]) for split in splits]
        rows.append((f"{len(names) - len(shown)} more classes", *map(_part, rest, splits)))
    if "max_length" in summary:
        for key, title in (("p5", "5th percentile"), ("p50", "median"), ("p95", "95th percentile"), ("max", "most")):
            rows.append((f"tokens, {title}", *(f"{split['tokens'][key]:,}" for split in splits)))
        rows.append((f"cut at {summary['max_length']} tokens", *(_part(split["cut"], split) for split in splits)))
    return rows


def summary_notes(summary: dict[str, Any]) -> list[str]:
    """What a table cannot show, a line each."""
    notes = []
    if summary["duplicates_dropped"] is not None:
        notes.append(f"duplicates dropped: {summary['duplicates_dropped']:,}")
        notes.append(f"examples with contradicting labels: {summary['contradicting']:,}")
        notes += [f"  {contradiction}" for contradiction in summary["contradictions"]]
        more = summary["contradicting"] - len(summary["contradictions"])
        notes += [f"  and {more:,} more"] if more else []
    counts = summary["splits"]["train"]["classes"]
    rare, common = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[common] >= _UNEVEN * counts[rare]:
        notes.append(
            f"uneven classes: {counts[common]:,} training examples of '{common}', {counts[rare]:,} of '{rare}'; see "
            "data.class_weights and stages.best_metric"
        )
    return notes


def _part(count: int, split: dict[str, Any]) -> str:
    return f"{count:,} ({count / split['examples']:.1%})"
