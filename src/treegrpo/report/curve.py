"""The training curve: rewards over a run's iterations, and panels of how healthy it is.

Left out: the records that it draws (`tracking.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from treegrpo.readable import number
from treegrpo.report import fonts, style

Records = Sequence[Mapping[str, float]]
Numbers = NDArray[np.float64]

# A panel's name, and the value above which it says something: a ratio of 1, or a clip and a
# divergence of 0 mean that every step was taken on the policy that sampled, or are not in use.
_HEALTH = {
    "gradient_norm": ("gradient norm", None),
    "reward_std_within_group": ("spread of rewards within a group", None),
    "kl": ("KL divergence from the initial model", 0.0),
    "ratio": ("ratio of new to old policy, minus 1", 1e-4),
    "clip_fraction": ("share of clipped edges", 0.0),
    "learning_rate": ("learning rate", None),
    "seconds": ("seconds an iteration", None),
}
_LARGEST = 5.0
"""Panels end at so many medians: one slow iteration would make a line of all others."""
_MAIN_WIDTH, _HEALTH_WIDTH = 0.63, 0.37  # of the page
_TITLE_ROOM = 5.0  # inches


def training_curve(
    path: Path,
    metrics: Records,
    evaluations: Records = (),
    rewards: Mapping[str, bool] | None = None,
    *,
    averaged: bool = True,
) -> None:
    """Write a PNG with the reward (and accuracy) per iteration, and small panels of health.

    Args:
        path: the file; its folder is made.
        metrics: one record per iteration, as training writes them; what is missing or not finite is
            left out.
        evaluations: mappings with `iteration` and `reward` or `accuracy`, on held-out prompts, and
            their `reward_standard_error`, `accuracy_standard_error`.
        rewards: by name, whether it is trained on. Several share a panel of their normalised
            values, where a watched one that falls while the trained ones rise stands out.
        averaged: whether evaluations are of the weights' moving average.

    Raises:
        ValueError: neither holds a reward or an accuracy.
    """

    def has(key: str, *sources: Records) -> bool:
        return any(len(_series(source, key)[0]) for source in sources)

    main = [key for key in ("accuracy", "reward") if has(key, metrics, evaluations)]
    if not main:
        raise ValueError("metrics: got no iteration with a reward; there is nothing to draw")
    health = [panel for panel in _HEALTH if _says_something(metrics, panel)]
    named = dict(rewards or {})
    together = {name: of for name, of in named.items() if has(f"reward_normalized/{name}", metrics)}
    trained = next((name for name, of in named.items() if of), "")
    count = len(main) + (len(together) > 1)
    size = (style.PAGE_WIDTH, max(5.4, 2.6 * count, 1.3 * len(health)))
    edges = ConstrainedLayoutEngine(rect=(0.015, 0.015, 0.97, 0.97), h_pad=0.08)
    figure = Figure(figsize=size, facecolor=style.PAPER, layout=edges)
    parts: Any = figure.subfigures(
        1, 2, width_ratios=[_MAIN_WIDTH, _HEALTH_WIDTH] if health else [1, 1e-3], wspace=0.04
    )
    panels = _panels(parts[0], count)
    titles = {
        "accuracy": "share of pictures that are right",
        "reward": f"mean {trained or 'reward'}",
    }
    for key, axes in zip(main, panels, strict=False):
        _draw_main(axes, metrics, evaluations, key, titles[key])
    if len(together) > 1:
        _draw_rewards(panels[-1], metrics, together)
    _explain(figure, panels[0], averaged=averaged)
    for key, axes in zip(health, _panels(parts[1], len(health)) if health else [], strict=True):
        _draw_health(axes, metrics, key)
    style.save(figure, path)


def _panels(part: SubFigure, count: int) -> list[Axes]:
    """Axes one below the other, over iterations."""
    panels = part.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    panels[-1].set_xlabel("iteration", color=style.MUTED, fontsize=9)
    return list(panels)


def _explain(figure: Figure, axes: Axes, *, averaged: bool) -> None:
    """Say above all panels what the two lines are, and why they differ."""
    lines, names = axes.get_legend_handles_labels()
    weights = "the weights' moving average" if averaged else "the same weights"
    words = {
        "training": "training prompts: rollouts, sampled with noise from the weights as they are "
        "(smoothed)",
        "held out": f"held-out prompts: sampled without noise from {weights} (± standard error)",
    }
    figure.legend(
        lines,
        [words[name] for name in names],
        loc="outside upper left",
        frameon=False,
        fontsize=9,
        labelcolor=style.MUTED,
    )


def _says_something(metrics: Records, panel: str) -> bool:
    values = np.concatenate([_series(metrics, key)[1] - _shift(panel) for key in _keys(panel)])
    least = _HEALTH[panel][1]
    return bool(len(values)) and (least is None or bool(np.abs(values).max() > least))


def _keys(panel: str) -> tuple[str, ...]:
    return ("ratio_min", "ratio_mean", "ratio_max") if panel == "ratio" else (panel,)


def _shift(panel: str) -> float:
    return float(panel == "ratio")


def _draw_main(axes: Axes, metrics: Records, evaluations: Records, key: str, title: str) -> None:
    percent = key == "accuracy"
    # Beside the figures.
    _style_axes(axes, title, size=fonts.fitting(title, 11, _TITLE_ROOM - 1.8))
    x, y = _series(metrics, key)
    if len(x):
        axes.plot(x, y, color=style.ACCENT, alpha=0.25, linewidth=1)
        _draw_smooth(axes, x, y, color=style.ACCENT, linewidth=2.2, label="training")
    x, y = _series(evaluations, key)
    if len(x):
        (dots,) = axes.plot(x, y, color=style.GOOD, linewidth=1.2, label="held out")
        dots.set(marker="o", markersize=6, markeredgecolor=style.PAPER, zorder=4)
        errors = dict(zip(*_series(evaluations, f"{key}_standard_error"), strict=True))
        error = np.array([errors.get(place, 0.0) for place in x])
        axes.fill_between(x, y - error, y + error, color=style.GOOD, alpha=0.15, linewidth=0)
        digits = min(filter(None, (error[0], error[-1])), default=None)
        ends = [f"{end:.0%}" if percent else number(end, digits) for end in (y[0], y[-1])]
        text = " → ".join(ends[: len(x)])
        axes.set_title(text, loc="right", color=style.GOOD, fontsize=11, weight="bold", pad=6)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(x=0.03, y=0.1)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _draw_rewards(axes: Axes, metrics: Records, rewards: Mapping[str, bool]) -> None:
    title = "each reward, in standard deviations above the untrained model"
    for (name, trained), color in zip(rewards.items(), cycle(style.SERIES), strict=False):
        x, y = _series(metrics, f"reward_normalized/{name}")
        how = {"linewidth": 2} if trained else {"linewidth": 1.4, "linestyle": (0, (4, 2))}
        label = name if trained else f"{name} (watched)"
        _draw_smooth(axes, x, y, color=color, label=label, **how)
    axes.axhline(0, color=style.NEUTRAL, linewidth=1, zorder=1)
    axes.margins(x=0.03, y=0.1)
    lines, names = axes.get_legend_handles_labels()
    names = [fonts.wrap(name, 8, 1.9, 1) for name in names]
    widest = max(fonts.width(name, 8) for name in names) + 0.55  # with its line
    columns = min(3, int(_TITLE_ROOM / widest))
    rows = -(-len(rewards) // columns)
    # Below the title, which leaves room for its rows.
    legend = axes.legend(
        lines,
        names,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1),
        ncols=columns,
        frameon=False,
        prop={"size": 8, "family": fonts.families("".join(names))},
        labelcolor=style.MUTED,
    )
    legend.set_in_layout(False)
    _style_axes(axes, title, size=fonts.fitting(title, 11, _TITLE_ROOM), pad=12 + 13 * rows)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_smooth(axes: Axes, x: Numbers, y: Numbers, **how: Any) -> None:
    """The Gaussian-weighted mean around each point, as wide as 1/40 of the run."""
    width = max(len(y) / 40, 1e-9)
    half = min(int(4 * width), len(y) - 1)
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / width) ** 2)
    sums, weights = (
        np.convolve(values, kernel)[half : half + len(y)] for values in (y, np.ones(len(y)))
    )
    axes.plot(x, sums / weights, marker="o" if len(x) == 1 else "", **how)


def _draw_health(axes: Axes, metrics: Records, panel: str) -> None:
    title, _ = _HEALTH[panel]
    _style_axes(axes, title, size=9)
    everything = []
    for key in _keys(panel):
        x, y = _series(metrics, key)
        everything.append(y - _shift(panel))
        color = style.NEUTRAL if key in ("ratio_min", "ratio_max") else style.MUTED
        marker = "." if len(x) == 1 else ""
        axes.plot(x, everything[-1], color=color, linewidth=1.2, marker=marker)
    values = np.abs(np.concatenate(everything))
    top = 1.15 * values.max() or 1.0
    if panel == "ratio":
        axes.set_ylim(-top, top)
    else:
        top = min(top, 1.15 * _LARGEST * float(np.median(values)) or top)
        axes.set_ylim(-0.03 * top, top)  # a line at 0 shows
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set(size=8, color=style.MUTED, x=1, ha="right")
    axes.yaxis.set_major_locator(MaxNLocator(3))


def _style_axes(axes: Axes, title: str, size: float, pad: float = 6) -> None:
    font: Any = {"fontsize": size, "fontfamily": fonts.families(title), "color": style.INK}
    axes.set_title(title, loc="left", pad=pad, parse_math=False, **font)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(style.RULE)
    axes.grid(axis="y", color=style.RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=style.MUTED, labelsize=8, length=0, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _series(rows: Records, key: str) -> tuple[Numbers, Numbers]:
    """Iterations and finite values of the rows that have the key."""
    points = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(y)
    return x[finite], y[finite]
