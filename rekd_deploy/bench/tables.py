"""Figures as lines of a table. torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(name, value) of every number; nested names joined by spaces, lists left to the JSON but for curves."""
    rows: list[tuple[str, ...]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping) and {"rates", "accuracies"} <= set(value):
            rows += [
                (f"{name} at {rate:.0%}", shown(found))
                for rate, found in zip(value["rates"], value["accuracies"], strict=True)
            ]
            rows += [(f"{name} {key}", shown(value[key])) for key in ("area", "note") if key in value]
        elif isinstance(value, Mapping):
            rows += [(f"{name} {inner}", text) for inner, text in figure_rows(value)]
        elif not isinstance(value, (list, tuple)):
            rows.append((name, shown(value)))
    return rows


def shown(value: Any) -> str:
    """A figure as a table shows it."""
    if value is None:
        return "none"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
