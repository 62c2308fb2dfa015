"""Finished cells as a Markdown table: mean and spread over seeds, and what a difference is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from _models import from_bits

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Result files by cell and seed."""

TOLERANCE = 0.005
"""Realised rates this close to the target are matched."""


ACCURACY = ("model", "accuracy", "seeds", "kept of real features", "calibration error", "median seconds")
DIFFERENCES = (
    "question", "difference in points", "standard error over seeds", "each seed: difference [95 % of bootstrap]",
)  # fmt: skip


def accuracy_table(results: Results, rows: Sequence[tuple[str, str, float | None]]) -> list[str]:
    """``accuracy_rows`` in Markdown."""
    return _markdown(ACCURACY, accuracy_rows(results, rows))


def accuracy_rows(results: Results, rows: Sequence[tuple[str, str, float | None]]) -> list[tuple[str, ...]]:
    """One row a model, with the columns ``ACCURACY``.

    Args:
        rows: cell, what to call it, and its target rate (None: it reads everything).
    """
    lines: list[tuple[str, ...]] = []
    for name, title, target in rows:
        found = list(results.get(name, {}).values())
        if not found:
            lines.append((title, "not run", "0", "", "", ""))
            continue
        rates = [each["rate"] for each in found]
        off = target is not None and any(abs(rate - target) > TOLERANCE for rate in rates)
        shown = "all" if target is None else f"{_percent(rates)}{' (**not matched**)' if off else ''}"
        errors = [each["ece"] if "ece" in each else each["report"]["calibration"]["ece"] for each in found]
        lines.append((
            title, _spread([each["accuracy"] for each in found]), str(len(found)), shown, _spread(errors),
            f"{np.median([each['seconds'] for each in found]):.0f}",
        ))  # fmt: skip
    return lines


def modes_table(results: Results, rows: Sequence[tuple[str, str, float | None]]) -> list[str]:
    """How the same models answer when their scores are decided otherwise, and how they agree with their teacher."""
    lines = [
        "| model | stored rule | argmax | sampled | flip rate | area 5-100 % | teacher: mask Jaccard | rank corr. |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title, _ in rows:
        reports = [each["report"] for each in results.get(name, {}).values() if "modes" in each.get("report", {})]
        if not reports:
            continue

        def column(*path: str, reports=reports) -> str:
            values = [_at(report, path) for report in reports]
            return "" if any(value is None for value in values) else f"{np.mean(values):.3f}"

        def decided(mode: str, reports=reports) -> str:
            rates = [_at(report, ("modes", mode, "rate")) for report in reports]
            return "" if None in rates else f"{column('modes', mode, 'accuracy')} at {_percent(rates)}"

        cells = [
            title, decided("stored"), decided("argmax"), decided("sampled"), column("modes", "sampled", "flip_rate"),
            column("curve", "area"), column("teacher", "mask_jaccard"), column("teacher", "score_rank_correlation"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def comparison_table(results: Results, pairs: Sequence[tuple[str, str, str]]) -> list[str]:
    """``comparison_rows`` in Markdown."""
    return _markdown(DIFFERENCES, comparison_rows(results, pairs))


def comparison_rows(results: Results, pairs: Sequence[tuple[str, str, str]]) -> list[tuple[str, ...]]:
    """Differences on the same seeds and test items, with the columns ``DIFFERENCES``.

    Args:
        pairs: the cell that is hoped to be better, the one it is compared with, and the question.
    """
    lines: list[tuple[str, ...]] = []
    for better, other, question in pairs:
        seeds = sorted(results.get(better, {}).keys() & results.get(other, {}).keys())
        if not seeds:
            continue
        draws = []
        for seed in seeds:
            first, second = results[better][seed], results[other][seed]
            if first["examples"] == second["examples"]:
                right = [from_bits(each["correct"], each["examples"]) for each in (first, second)]
                draws.append(paired_bootstrap(*right))
        mean, std = mean_and_std([100 * draw["difference"] for draw in draws])
        error = f"{std / np.sqrt(len(draws)):.2f}" if len(draws) > 1 else "one seed"
        each = ", ".join(f"{100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]" for d in draws)
        lines.append((question, f"{mean:+.2f}", error, each))
    return lines


def truth_table(results: Results, rows: Sequence[tuple[str, str, float | None]]) -> list[str]:
    """Where the deciding region is known: does the rationale lie in it?"""
    lines = [
        "| model | kept patches in the true tile | share of the tile kept | kept / size of the tile |",
        "|---|---|---|---|",
    ]
    for name, title, _ in rows:
        found = [
            each["report"]["truth"] for each in results.get(name, {}).values() if "truth" in each.get("report", {})
        ]
        if found:
            cells = [_percent([each[key] for each in found]) for key in ("in_truth", "truth_kept", "truth_size_used")]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def provenance(results: Results, command: str) -> list[str]:
    """The command, the machines and the versions that made the figures."""
    found = {
        "; ".join(f"{key} {value}" for key, value in each["environment"].items())
        for seeds in results.values()
        for each in seeds.values()
    }
    return ["```sh", command, "```", "", *(f"- {line}" for line in sorted(found))]


def _markdown(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in (columns, *rows)]
    return [lines[0], f"|{'---|' * len(columns)}", *lines[1:]]


def _at(report: Mapping[str, Any], path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(report, Mapping) or key not in report:
            return None
        report = report[key]
    return report


def _spread(values: Sequence[float]) -> str:
    mean, std = mean_and_std(values)
    return f"{mean:.4f} ± {std:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _percent(values: Sequence[float]) -> str:
    mean, std = mean_and_std(values)
    return f"{mean:.2%} ± {100 * std:.2f}" if len(values) > 1 else f"{mean:.2%}"


def paired_bootstrap(first: np.ndarray, second: np.ndarray, draws: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Difference of two models' accuracy on the same test items, with a percentile interval.

    Items are drawn with replacement, the same ones for both models (Efron and Tibshirani 1993; Berg-Kirkpatrick
    et al. 2012 for systems on one test set).

    Args:
        first: (n,) bool, whether the first model was right.
        second: (n,) bool, of the second.

    Returns:
        ``difference`` = accuracy of the first - of the second, ``low`` and ``high`` of its 95 % interval,
        ``standard_error``, and ``p_not_better``: share of draws in which the first is not better.
    """
    gains = first.astype(np.int64) - second.astype(np.int64)
    # only +1, 0 and -1 occur, so a draw of n items is a multinomial of their numbers
    counts = np.array([(gains > 0).sum(), (gains < 0).sum(), (gains == 0).sum()])
    drawn = np.random.default_rng(seed).multinomial(len(gains), counts / len(gains), size=draws)
    differences = (drawn[:, 0] - drawn[:, 1]) / len(gains)
    low, high = np.percentile(differences, (2.5, 97.5))
    return {
        "difference": float(gains.mean()),
        "low": float(low),
        "high": float(high),
        "standard_error": float(differences.std()),
        "p_not_better": float(np.mean(differences <= 0)),
    }


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is 0 for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
