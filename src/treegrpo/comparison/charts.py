"""Charts of a comparison, as SVG inside a page: reward against cost, and curves on three axes.

Each is narrow, so that a phone shows it as wide as its screen and a desk puts several in a row.

Left out: the page around them (`page.py`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from treegrpo.comparison.outcome import Outcome, Point
from treegrpo.comparison.summary import MeanPoint, frontier, mean_curve
from treegrpo.report import style

Value = Callable[[Point], float]

SIZE = (4.8, 3.5)
"""Inches."""
AXES: dict[str, tuple[str, Value]] = {
    "cost": ("cost in forwards", lambda point: point.cost),
    "images": ("images drawn for training", lambda point: float(point.images)),
    "seconds": ("seconds of training", lambda point: point.seconds),
}
_MARKERS = "osD^vP"


def pareto(outcomes: Mapping[str, Sequence[Outcome]], value: Value, name: str) -> str:
    """Every measured point, its cost across and its value up, and the line that none is beyond."""
    drawing, axes = _chart(f"{name} against cost, and the best of all", AXES["cost"][0])
    means: list[tuple[float, float]] = []
    for (label, runs), how in zip(outcomes.items(), _looks(), strict=False):
        curve = mean_curve(runs, AXES["cost"][1])
        points = [(point.x, point.figure(value).mean) for point in curve]
        means += points
        faint = [(p.cost, value(p)) for run in runs if run.error is None for p in run.curve]
        if faint:
            axes.scatter(*_columns(faint), s=7, color=how["color"], alpha=0.3, lw=0)
        if points:
            axes.scatter(
                *_columns(points),
                s=26,
                label=label,
                color=how["color"],
                marker=how["marker"],
                edgecolor=style.PAPER,
                linewidth=0.6,
                zorder=3,
            )
    best = frontier(means)
    if best:
        ends = [*best, (max(x for x, _ in means), best[-1][1])]
        line: dict[str, Any] = {"linewidth": 5, "alpha": 0.5, "solid_capstyle": "round"}
        axes.step(*_columns(ends), where="post", color=style.NEUTRAL, zorder=1, **line)
    return _finished(drawing, axes, name)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def curves(outcomes: Mapping[str, Sequence[Outcome]], axis: str, value: Value, name: str) -> str:
    """Means over seeds along an axis of `AXES`, and a band of one standard deviation."""
    title, along = AXES[axis]
    drawing, axes = _chart(f"{name} by {title}", title)
    for (label, runs), how in zip(outcomes.items(), _looks(), strict=False):
        curve = mean_curve(runs, along)
        if curve:
            _draw_curve(axes, curve, value, label, how)
    return _finished(drawing, axes, name)


def _draw_curve(
    axes: Axes, curve: Sequence[MeanPoint], value: Value, label: str, how: Mapping[str, Any]
) -> None:
    x, figures = [point.x for point in curve], [point.figure(value) for point in curve]
    means = [figure.mean for figure in figures]
    axes.plot(x, means, label=label, linewidth=1.6, markersize=4, **how)
    low = [figure.mean - (figure.std or 0.0) for figure in figures]
    high = [figure.mean + (figure.std or 0.0) for figure in figures]
    axes.fill_between(x, low, high, color=how["color"], alpha=0.13, linewidth=0)


def _looks() -> Any:
    """Of one entry after the other: six colors, then the same with other lines and markers."""
    for number in cycle(range(len(style.SERIES) * 3)):
        turn, place = divmod(number, len(style.SERIES))
        line = ("-", "--", ":")[turn]
        marker = _MARKERS[(place + turn) % len(_MARKERS)]
        yield {"color": style.SERIES[place], "linestyle": line, "marker": marker}


def _chart(title: str, across: str) -> tuple[Drawing, Axes]:
    drawing = Drawing(figsize=SIZE, facecolor=style.PAPER, layout="constrained")
    axes = drawing.add_subplot()
    axes.set_title(title, loc="left", color=style.INK, fontsize=11, pad=8)
    axes.set_xlabel(across, color=style.MUTED, fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(style.RULE)
    axes.tick_params(colors=style.MUTED, labelsize=9, length=0)
    axes.grid(axis="y", color=style.RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return drawing, axes


def _finished(drawing: Drawing, axes: Axes, name: str) -> str:
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    right = axes.get_xlim()[1]
    axes.set_xlim(-0.015 * right, right)  # room for half a marker
    if name == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=style.INK, loc="best")
    file = io.StringIO()
    # Letters as outlines look alike everywhere; a salt keeps the file the same from run to run.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        drawing.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # It takes the width that the page gives it.
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
