"""From figures to verdicts in plain words, each with the limit that it was held against. torch-free."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rekd_deploy.bench.results import Check

LEAK_LIMIT = 0.05
"""Accuracy that a pattern may add to what is known without it: 5 points."""


def not_applicable(name: str, why: str, limit: float | None = None) -> Check:
    """A check that cannot be made here."""
    return Check(name=name, outcome="not applicable", words=why, limit=limit)


def paired(values: np.ndarray) -> dict[str, float]:
    """``mean``, ``low`` and ``high`` (95 %, bootstrap over items) of paired differences (n,)."""
    from rekd_train.evaluation.metrics import bootstrap_mean

    return bootstrap_mean(np.asarray(values, dtype=float))


def leak_check(name: str, gain: Mapping[str, float], said: str, limit: float = LEAK_LIMIT) -> Check:
    """A pattern must not add more than ``limit`` to a baseline.

    Args:
        gain: as ``paired`` makes it.
        said: what the gain is, for the sentence.
    """
    shown = f"{said}: {_points(gain)} (limit {100 * limit:g} points)"
    if gain["mean"] <= limit:
        return Check(name=name, outcome="passed", words=shown, value=gain["mean"], limit=limit)
    if gain["low"] <= 0:
        return Check(name=name, outcome="not applicable", words=f"{shown}; too few examples to tell it from none",
                     value=gain["mean"], limit=limit)  # fmt: skip
    return Check(name=name, outcome="failed", words=shown, value=gain["mean"], limit=limit)


def better_check(name: str, gain: Mapping[str, float], said: str, points: bool = True) -> Check:
    """Something must be better than its baseline: the 95 % interval of the gain lies above 0."""
    shown = f"{said}: {_points(gain) if points else _interval(gain)} (limit: above 0 with 95 % confidence)"
    outcome = "passed" if gain["low"] > 0 else "failed"
    return Check(name=name, outcome=outcome, words=shown, value=gain["mean"], limit=0.0)


def _points(gain: Mapping[str, float]) -> str:
    return f"{100 * gain['mean']:+.1f} points ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"


def _interval(gain: Mapping[str, float]) -> str:
    return f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
