"""The registry of the blocks of figures in README and docs, and how their values are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Block = Callable[[], list[str]]
BLOCKS: dict[str, Block] = {}
_SOURCES: dict[str, tuple[str, ...]] = {}


def block(*sources: str) -> Callable[[Block], Block]:
    """Register a block by the name of its function; ``sources`` are files or folders of ``RESULTS``."""

    def register(function: Block) -> Block:
        BLOCKS[function.__name__] = function
        _SOURCES[function.__name__] = sources
        return function

    return register


def sources_of(name: str) -> list[str]:
    """The results of a block, from the project's root.

    Raises:
        KeyError: there is no such block.
    """
    return [f"benchmarks/results/{source}" for source in _SOURCES[name]]


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def ranged(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" and {values[-1]}" if len(values) > 1 else str(values[0])
