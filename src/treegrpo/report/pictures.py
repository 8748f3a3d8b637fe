"""Pictures of a run: samples before and after, a grid of samples, and the training curve.

Left out: the picture of a tree (`tree.py`), the page of `treegrpo evaluate` (`comparison.py`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from treegrpo.report import style

Records = Sequence[Mapping[str, float]]
Numbers = NDArray[np.float64]

# Inches.
_MARGIN = 0.3
_PROMPT_WIDTH = 2.0
_BLOCK_GAP = 0.4
_GAP = 0.1
_ROW_GAP = 0.18
_IMAGE_SIDES = (0.4, 1.4)


# --- grids of images ---


@dataclass(frozen=True)
class _Block:
    """Images that stand side by side in every row, and what is written above them.

    Attributes:
        images: float [prompts, n, 3, H, W] in [0, 1].
        correct: bool [prompts, n].
    """

    images: Tensor
    label: str | None = None
    correct: Tensor | None = None
    accuracy: float | None = None


def image_grid(path: Path, prompts: Sequence[str], images: Tensor) -> None:
    """Write a PNG with one row per prompt: its text, its images [prompts, n, 3, H, W] in [0, 1].

    Raises:
        ValueError: the images' shape does not fit the prompts.
    """
    _check_images("images", images, prompts)
    _draw_grid(path, prompts, [_Block(images)])


def before_after(
    path: Path,
    prompts: Sequence[str],
    before: Tensor,
    after: Tensor,
    correct_before: Tensor | None = None,
    correct_after: Tensor | None = None,
    *,
    label_after: str = "after training",
    accuracy_before: float | None = None,
    accuracy_after: float | None = None,
) -> None:
    """Write a PNG with one row per prompt: its text, its images before, its images after.

    Args:
        path: the file; its folder is made.
        before, after: float [prompts, n, 3, H, W] in [0, 1].
        correct_before, correct_after: bool [prompts, n], which images show what their prompt says
            (a green frame and a check; else a red one and a cross); None: unknown.
        label_after: what the later images are called.
        accuracy_before, accuracy_after: in [0, 1], written in the header as "47 % right".

    Raises:
        ValueError: the shapes do not fit the prompts or one another.
    """
    _check_images("before", before, prompts)
    _check_images("after", after, prompts)
    if before.shape != after.shape:
        raise ValueError(
            f"after: got shape {list(after.shape)}; must be that of before, {list(before.shape)}"
        )
    for name, correct in (("correct_before", correct_before), ("correct_after", correct_after)):
        if correct is not None and correct.shape != before.shape[:2]:
            raise ValueError(
                f"{name}: got shape {list(correct.shape)}; must be {list(before.shape[:2])}, one "
                "value per image"
            )
    blocks = [
        _Block(before, "before training", correct_before, accuracy_before),
        _Block(after, label_after, correct_after, accuracy_after),
    ]
    _draw_grid(path, prompts, blocks)


def _draw_grid(path: Path, prompts: Sequence[str], blocks: Sequence[_Block]) -> None:
    columns, pixel_height, pixel_width = (blocks[0].images.shape[axis] for axis in (1, 3, 4))
    block_gaps, gaps = (columns - 1) * _GAP, (len(blocks) - 1) * _BLOCK_GAP
    # So that the images fill the page's width.
    room = style.PAGE_WIDTH - 2 * _MARGIN - _PROMPT_WIDTH - (len(blocks) * block_gaps + gaps)
    width = min(max(room / (len(blocks) * columns), _IMAGE_SIDES[0]), _IMAGE_SIDES[1])
    height = width * pixel_height / pixel_width
    block_width, row_height = columns * width + block_gaps, height + _ROW_GAP
    has_accuracy = any(block.accuracy is not None for block in blocks)
    header = (0.68 if has_accuracy else 0.36) if blocks[0].label else 0.0
    legend = 0.45 if any(block.correct is not None for block in blocks) else 0.0
    left, top = _MARGIN + _PROMPT_WIDTH, _MARGIN + header
    bottom = top + len(prompts) * row_height - _ROW_GAP
    figure, axes = style.page(
        left + len(blocks) * block_width + gaps + _MARGIN, bottom + legend + _MARGIN
    )
    middles = [top + row * row_height + height / 2 for row in range(len(prompts))]
    for prompt, y in zip(prompts, middles, strict=True):
        _write_prompt(axes, prompt, y, height)
    if legend:
        _write_legend(axes, left, bottom + legend)
    for block in blocks:
        if block.label:
            _write_header(axes, block.label, block.accuracy, left, top, block_width)
        for row, y in enumerate(middles):
            for column, image in enumerate(block.images[row]):
                x = left + column * (width + _GAP) + width / 2
                right = None if block.correct is None else bool(block.correct[row, column])
                _put_judged(axes, image, right, (x, y), (width, height))
        left += block_width + _BLOCK_GAP
    style.save(figure, path)


def _check_images(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    if not prompts:
        raise ValueError("prompts: got none; at least one is needed")
    if images.ndim != 5 or images.shape[0] != len(prompts) or images.shape[2] != 3:
        raise ValueError(
            f"{name}: got shape {list(images.shape)}; must be [{len(prompts)}, n, 3, H, W] for "
            f"{len(prompts)} prompts"
        )
    if 0 in images.shape:
        raise ValueError(f"{name}: got shape {list(images.shape)}; there is nothing to draw")


def _write_prompt(axes: Axes, prompt: str, y: float, height: float) -> None:
    lines = max(int(height / 0.19), 1)
    text = textwrap.fill(prompt, 23, max_lines=lines, placeholder=" …")
    style.write(axes, (_MARGIN, y), text, size=10)


def _write_header(
    axes: Axes, label: str, accuracy: float | None, left: float, bottom: float, width: float
) -> None:
    y = bottom - 0.24
    if accuracy is not None:
        text = f"{_percent(accuracy)} right"
        style.write(axes, (left, y), text, size=16, bold=True, valign="baseline")
        y -= 0.3
    style.write(axes, (left, y), label, size=11, color=style.MUTED, valign="baseline")
    axes.plot([left, left + width], [bottom - 0.14] * 2, color=style.RULE, linewidth=1)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _put_judged(
    axes: Axes, image: Tensor, right: bool | None, center: style.Pair, size: style.Pair
) -> None:
    if right is None:
        style.put_image(axes, image, center, size)
        return
    color = style.GOOD if right else style.BAD
    style.put_image(axes, image, center, size, color=color, line_width=2)
    _put_mark(axes, right, center[0] + size[0] / 2 - 0.01, center[1] + size[1] / 2 - 0.01)


def _put_mark(axes: Axes, right: bool, x: float, y: float) -> None:
    """A round badge, 0.16 inches wide, with a check or a cross."""
    color, paper = style.GOOD if right else style.BAD, style.PAPER
    axes.add_patch(Circle((x, y), 0.08, facecolor=color, edgecolor=paper, linewidth=1, zorder=5))
    check = [[(-0.036, 0.004), (-0.01, 0.03), (0.038, -0.026)]]
    cross = [[(-0.028, -0.028), (0.028, 0.028)], [(-0.028, 0.028), (0.028, -0.028)]]
    for stroke in check if right else cross:
        xs, ys = zip(*((x + dx, y + dy) for dx, dy in stroke), strict=True)
        (line,) = axes.plot(xs, ys, color=paper, linewidth=1.4, zorder=6)
        line.set(solid_capstyle="round", solid_joinstyle="round")


def _write_legend(axes: Axes, x: float, y: float) -> None:
    for right, text in ((True, "exactly what the prompt says"), (False, "something is wrong")):
        _put_mark(axes, right, x + 0.08, y)
        style.write(axes, (x + 0.24, y), text, color=style.MUTED)
        x += 2.5


# --- curves ---

_HEALTH = {
    "ratio": "ratio of new to old policy, minus 1",
    "clip_fraction": "share of clipped edges",
    "gradient_norm": "gradient norm",
    "reward_std_within_group": "spread of rewards within a group",
}


def training_curve(
    path: Path,
    metrics: Records,
    evaluations: Records = (),
    rewards: Mapping[str, bool] | None = None,
) -> None:
    """Write a PNG with the reward (and accuracy) per iteration, and small panels of health.

    Args:
        path: the file; its folder is made.
        metrics: one record per iteration, as training writes them; what is missing or not finite is
            left out.
        evaluations: mappings with `iteration` and `reward` or `accuracy`, on held-out prompts.
        rewards: by name, whether it is trained on. Several share a panel of their normalised
            values, where a watched one that falls while the trained ones rise stands out.

    Raises:
        ValueError: neither holds a reward or an accuracy.
    """

    def has(key: str, *sources: Records) -> bool:
        return any(len(_series(source, key)[0]) for source in sources)

    main = [key for key in ("accuracy", "reward") if has(key, metrics, evaluations)]
    if not main:
        raise ValueError("metrics: got no iteration with a reward; there is nothing to draw")
    health = [panel for panel in _HEALTH if any(has(key, metrics) for key in _keys(panel))]
    named = (rewards or {}).items()
    together = {name: of for name, of in named if has(f"reward_normalized/{name}", metrics)}
    count = len(main) + (len(together) > 1)
    figure = Figure(figsize=(style.PAGE_WIDTH, max(5.4, 2.5 * count)), facecolor=style.PAPER)
    panels = _panels(figure, count, left=0.08, right=0.6 if health else 0.97, hspace=0.32)
    for key, axes in zip(main, panels, strict=False):
        _draw_main(axes, metrics, evaluations, key)
        if key == "reward" and len(together) > 1:
            axes.set_title(f"mean of {next(n for n in together if together[n])}", loc="left")
    if len(together) > 1:
        _draw_rewards(panels[-1], metrics, together)
    panels[0].legend(loc="lower right", frameon=False, fontsize=9, labelcolor=style.MUTED)
    if health:
        panels = _panels(figure, len(health), left=0.69, right=0.97, hspace=0.62)
        for key, axes in zip(health, panels, strict=True):
            _draw_health(axes, metrics, key)
    style.save(figure, path)


def _panels(figure: Figure, count: int, *, left: float, right: float, hspace: float) -> list[Axes]:
    """Axes one below the other, over iterations."""
    grid = figure.add_gridspec(count, left=left, right=right, top=0.92, bottom=0.11, hspace=hspace)
    panels = grid.subplots(sharex=True, squeeze=False)[:, 0]
    panels[-1].set_xlabel("iteration", color=style.MUTED, fontsize=9, labelpad=6)
    return list(panels)


def _keys(panel: str) -> tuple[str, ...]:
    return ("ratio_min", "ratio_mean", "ratio_max") if panel == "ratio" else (panel,)


def _draw_main(axes: Axes, metrics: Records, evaluations: Records, key: str) -> None:
    percent = key == "accuracy"
    _style_axes(axes, "share of pictures that are right" if percent else "mean reward", size=11)
    x, y = _series(metrics, key)
    if len(x):
        axes.plot(x, y, color=style.ACCENT, alpha=0.25, linewidth=1)
        _draw_smooth(axes, x, y, color=style.ACCENT, linewidth=2.2, label="training prompts")
    x, y = _series(evaluations, key)
    if len(x):
        (dots,) = axes.plot(x, y, color=style.GOOD, linewidth=1.2, label="held-out prompts")
        dots.set(marker="o", markersize=6.5, markeredgecolor=style.PAPER, zorder=4)
        # The outer side of a curve that mostly rises or mostly falls is free of lines.
        rising = y[-1] >= y[0]
        for end, above in {0: not rising, len(x) - 1: rising}.items():
            axes.annotate(
                _percent(y[end]) if percent else f"{y[end]:#.3g}",
                (x[end], y[end]),
                (0, 9 if above else -9),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                color=style.GOOD,
                fontsize=10,
                weight="bold",
                zorder=5,
                path_effects=[withStroke(linewidth=3, foreground=style.PAPER)],
            )
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.margins(x=0.05, y=0.24)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _draw_rewards(axes: Axes, metrics: Records, rewards: Mapping[str, bool]) -> None:
    _style_axes(axes, "each reward, in standard deviations above the untrained model", size=11)
    for (name, trained), color in zip(rewards.items(), cycle(style.SERIES), strict=False):
        x, y = _series(metrics, f"reward_normalized/{name}")
        how = {"linewidth": 2} if trained else {"linewidth": 1.4, "linestyle": (0, (4, 2))}
        label = name if trained else f"{name} (watched)"
        _draw_smooth(axes, x, y, color=color, label=label, **how)
    axes.axhline(0, color=style.NEUTRAL, linewidth=1, zorder=1)
    axes.margins(x=0.05, y=0.15)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.16 * (high - low))  # room for the legend
    font = {"fontsize": 8, "labelcolor": style.MUTED}
    axes.legend(loc="upper left", ncols=3, frameon=False, borderpad=0, **font)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_smooth(axes: Axes, x: Numbers, y: Numbers, **how: Any) -> None:
    """The Gaussian-weighted mean around each point, as wide as 1/40 of the run."""
    width = max((x[-1] - x[0]) / 40, 1e-9)
    weights = np.exp(-0.5 * ((x[:, None] - x[None, :]) / width) ** 2)
    axes.plot(x, weights @ y / weights.sum(1), marker="o" if len(x) == 1 else "", **how)


def _draw_health(axes: Axes, metrics: Records, panel: str) -> None:
    _style_axes(axes, _HEALTH[panel], size=9)
    shift, values = float(panel == "ratio"), []
    for key in _keys(panel):
        x, y = _series(metrics, key)
        values += list(y - shift)
        color = style.NEUTRAL if key in ("ratio_min", "ratio_max") else style.MUTED
        axes.plot(x, y - shift, color=color, linewidth=1.2, marker="." if len(x) == 1 else "")
    axes.margins(y=0.15)
    if panel == "clip_fraction":
        top = max(1.15 * max(values), 0.01)
        axes.set_ylim(-0.04 * top, top)  # a line at 0 shows
    if panel == "ratio":
        largest = max(1.15 * max(map(abs, values)), 1e-6)  # a rounding error is no news
        axes.set_ylim(-largest, largest)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.yaxis.get_offset_text().set(size=8, color=style.MUTED, x=1, ha="right")
    axes.yaxis.set_major_locator(MaxNLocator(3))


def _style_axes(axes: Axes, title: str, size: float) -> None:
    axes.set_title(title, loc="left", color=style.INK, fontsize=size, pad=6)
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
