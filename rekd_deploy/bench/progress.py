"""How measurements say how far they are; commands make bars of it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and how much there is to do."""


def silent(step: str, done: int, total: int) -> None:
    """Nobody watches."""
