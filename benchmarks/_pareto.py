"""Accuracy against time, as a picture: which pair is worth its milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from rekd_train.files import write_text

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 360, 70, 50


def picture(
    found: Mapping[str, Mapping[int, Mapping[str, Any]]], timed: Path, path: Path, batch: str = "8"
) -> list[str]:
    """Draw the pairs and their classifier, write the SVG, and return a section; empty without times or results.

    Args:
        found: results by cell and seed.
        timed: what ``pairs.py --times`` wrote.
    """
    if not timed.is_file():
        return []
    cells = json.loads(timed.read_text(encoding="utf-8"))["pairs"]
    points = {}
    for name, times in cells.items():
        for kind in ("alone", "distilled"):
            if seeds := found.get(name.replace("distilled", kind)):
                accuracy = float(np.mean([each["accuracy"] for each in seeds.values()]))
                points[name.replace("distilled", kind)] = times[batch]["ratio"]["ratio"], accuracy
    if seeds := found.get("cls"):
        points["cls"] = 1.0, float(np.mean([each["accuracy"] for each in seeds.values()]))
    if not points:  # timed, but no result is there
        return []
    write_text(path, drawn(points, f"time of a batch of {batch}, classifier = 1"))
    rows = [
        f"| {name} | {times['1']['ratio']['ratio']:.2f} | {times['8']['ratio']['ratio']:.2f} | "
        f"{times['1']['ratio_int8']['ratio']:.2f} | {times['8']['ratio_int8']['ratio']:.2f} | "
        f"{times['1']['ratio_both_int8']['ratio']:.2f} | {times['8']['ratio_both_int8']['ratio']:.2f} |"
        for name, times in cells.items()
    ]
    return [
        "## Time", "",
        "| pair | of the classifier's time, batch 1 | batch 8 | of its time in dynamic int8, batch 1 | batch 8 | "
        "its predictor in int8, too: batch 1 | batch 8 |",
        "|---|---|---|---|---|---|---|", *rows, "", f"![accuracy against time]({path.name})", "",
    ]  # fmt: skip


def drawn(points: Mapping[str, tuple[float, float]], axis: str) -> str:
    """An SVG of named points (time, accuracy)."""
    times, accuracies = zip(*points.values(), strict=True)
    low, high = min(accuracies) - 0.005, max(accuracies) + 0.005
    longest = max(times) * 1.15

    def place(time: float, accuracy: float) -> tuple[float, float]:
        x = LEFT + time / longest * (WIDTH - LEFT - 20)
        return x, HEIGHT - BOTTOM - (accuracy - low) / (high - low) * (HEIGHT - BOTTOM - 20)

    parts = []
    for step in np.linspace(low, high, 6):
        _, y = place(0, step)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{step:.3f}</text>')  # fmt: skip
    for step in np.linspace(0, longest, 6):
        x, _ = place(step, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:.2f}</text>')
    for name, point in points.items():
        x, y = place(*point)
        colour = {"alone": "#c60", "distilled": "#06c"}.get(name.partition("_")[0], "#555")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
                     f'<text x="{x + 7:.1f}" y="{y + 4:.1f}">{escape(name.replace("_", " "))}</text>')  # fmt: skip
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axis)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 40} {HEIGHT}" font-family="sans-serif"'
    return f'{head} font-size="12" fill="#555">{"".join(parts)}</svg>\n'
