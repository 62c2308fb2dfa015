"""What a report is made of: sections with tables, and charts as inline SVG.

Charts are drawn by matplotlib; its colours are then replaced by the page's variables (``--ink``, ``--c0``, ...), so
that they turn dark with it, and what would collide or leak on a page with several charts (ids, style sheets, metadata)
is taken out. They scale with the page and load nothing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rekd_deploy.bench.results import Check
from rekd_train.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Table:
    """Columns after the first are set to the right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    folded: bool = False
    """Whether it is shown only when asked for: long ones."""


@dataclass(frozen=True)
class Chart:
    """An inline SVG and what it shows."""

    caption: str
    svg: str


@dataclass
class Section:
    """One result; its maker adds to the lists."""

    anchor: str
    title: str
    subject: str
    """What was measured."""
    lead: list[str] = field(default_factory=list)
    """What comes out of it, in sentences."""
    tiles: list[tuple[str, str]] = field(default_factory=list)
    """A few figures that stand out: name, value."""
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)


# charts

SERIES = 8
"""Different colours."""
_INK, _LINE = "#010203", "#040506"
_PALETTE = tuple(f"#0a0b{number:02x}" for number in range(SERIES))
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)",
              **{colour: f"var(--c{number})" for number, colour in enumerate(_PALETTE)}}  # fmt: skip
_SIZE = (4.8, 2.9)
"""Inches; small, so that letters stay readable on a phone."""
_MARKERS = "osD^vP*X"
_LABEL_WIDTH = 22
"""Characters of a bar's name on one line."""


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, name: str, title: str, x: str, y: str,
    logarithmic: bool = False, whole_x: bool = False, diagonal: bool = False, percent: bool = False,
) -> str:  # fmt: skip
    """Lines with markers.

    Args:
        series: by what the legend says: x and y values.
        name: of the chart, unique on its page.
        title: in words, for those who cannot see it.
        x: label of the axis.
        y: label of the axis.
        logarithmic: both axes.
        whole_x: ticks at the x values alone.
        diagonal: a dashed line where y equals x.
        percent: both axes are shares.
    """
    with _figure(name, title, _SIZE[1] + 0.19 * _legend_rows(list(series))) as (axes, finished):
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_INK, linestyle="--", linewidth=0.8)
        for place, (label, (xs, ys)) in enumerate(series.items()):
            axes.plot(xs, ys, label=label, color=_PALETTE[place % SERIES], marker=_MARKERS[place % len(_MARKERS)],
                      markersize=4.5, linewidth=1.6, zorder=3 + SERIES - place)  # fmt: skip
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        _numbers(axes, whole_x, sorted({value for xs, _ in series.values() for value in xs}), logarithmic, percent)
        axes.set(xlabel=x, ylabel=y)
        if len(series) > 1 or not diagonal:
            _legend(axes)
    return finished[0]


def stacked_bars(rows: Mapping[str, Mapping[str, float]], *, name: str, title: str, x: str) -> str:
    """Horizontal bars made of parts, one bar a row; arguments as ``line_chart``."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    with _figure(name, title, 0.8 + 0.46 * len(rows) + 0.19 * _legend_rows(parts)) as (axes, finished):
        places = range(len(rows))
        left = [0.0] * len(rows)
        for number, part in enumerate(parts):
            widths = [row.get(part, 0.0) for row in rows.values()]
            axes.barh(places, widths, left=left, height=0.62, color=_PALETTE[number % SERIES], label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(list(places), [fill(row, _LABEL_WIDTH) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.grid(visible=False, axis="y")
        _legend(axes)
    return finished[0]


@contextmanager
def _figure(name: str, title: str, height: float) -> Any:
    """Axes to draw on, and a list that holds the SVG once the block has ended."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "bench") from None
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": ["DejaVu Sans"], "font.size": 10.5,
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _LINE, "xtick.color": _INK,
        "ytick.color": _INK, "grid.color": _LINE, "grid.linewidth": 0.6, "axes.spines.top": False,
        "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    }  # fmt: skip
    finished: list[str] = []
    with rc_context(settings):
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.add_subplot(), finished
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    finished.append(_inline(content.getvalue(), name, title))


def _legend_rows(labels: Sequence[str]) -> int:
    return -(-len(labels) // _legend_columns(labels))


def _legend_columns(labels: Sequence[str]) -> int:
    return 1 if any(len(label) > 26 for label in labels) else min(4, max(1, len(labels)))


def _legend(axes: Axes) -> None:
    columns = _legend_columns(axes.get_legend_handles_labels()[1])
    axes.figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=9.5, handlelength=1.6)


def _numbers(axes: Axes, whole_x: bool, values: Sequence[float], logarithmic: bool, percent: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    plain = FuncFormatter(lambda value, place: f"{value:g}")
    if whole_x:
        axes.set_xticks(list(values))
        axes.xaxis.set_major_formatter(plain)
        axes.minorticks_off()
    if logarithmic:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
    if percent:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _inline(document: str, name: str, title: str) -> str:
    """The ``<svg>`` element alone, made fit for a page."""
    text = document[document.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.S)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", text)
    opening, body = text.split(">", 1)
    opening = re.sub(r' (width|height|version)="[^"]*"', "", opening)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    return f'{opening} role="img" aria-label="{escape(title)}">{body}'
