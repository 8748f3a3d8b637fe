"""The picture of one prompt's forest, drawn as a tree.

The deterministic prefix that all leaves share is the trunk; from its top the levels are rings of a
crown, and a node stands at the middle of its leaves, so lines do not cross. Independent roots
share nothing, so they have no trunk: their first level is the innermost ring.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import PathPatch, Wedge
from matplotlib.path import Path as Curve
from torch import Tensor

from treegrpo.plan import RolloutPlan
from treegrpo.report import style

Color = tuple[float, float, float]
Point = tuple[float, float]

# Inches.
_MARGIN = 0.3
_CROWN_RADIUS = 3.95
_INNERMOST_RING = 0.95
_TRUNK_LEVEL = 1.3
_REWARD_ROOM = 0.55
_LARGEST_IMAGE = 0.66

_CROWN_ANGLE = math.radians(236)
_LEAF_ANGLE = math.radians(30)
"""At most, so that a crown of few leaves is narrow."""


def advantage_color(advantage: float, limit: float) -> Color:
    """The color of an edge: grey at zero, greener up to `limit`, more orange down to `-limit`.

    Returns:
        Red, green and blue in [0, 1].
    """
    end = to_rgb(style.GOOD if advantage > 0 else style.BAD)
    share = min(abs(advantage) / limit, 1.0) if limit > 0 else 0.0
    red, green, blue = (
        neutral + share * (target - neutral)
        for neutral, target in zip(to_rgb(style.NEUTRAL), end, strict=True)
    )
    return red, green, blue


def draw_forest(
    path: Path,
    plan: RolloutPlan,
    images: Mapping[int, Tensor],
    advantages: Mapping[int, Tensor],
    rewards: Tensor,
    prompt: str,
    sigmas: Sequence[float],
) -> None:
    """Write a PNG of one prompt's forest.

    Args:
        images: the levels to draw: level t (0..T, T the leaves) to float [widths[t], 3, H, W] in
            [0, 1]. The leaves and at least one other level are needed.
        advantages: every stochastic step to float [widths[step + 1]], one value per edge.
        rewards: float [leaves].
        sigmas: T + 1 noise levels, from 1 (all noise) down to 0.

    Raises:
        ValueError: a level, a step or a shape does not fit the plan.
    """
    _check(plan, images, advantages, rewards, sigmas)
    layout = _arrange(plan, images)
    limit = max(float(advantages[step].abs().max()) for step in plan.stochastic_steps)
    figure, axes = style.page(layout.width, layout.height)

    _shade_window(axes, plan, layout)
    for level, later in zip(layout.levels, layout.levels[1:], strict=False):
        for child in range(plan.widths[later]):
            parent = child * plan.widths[level] // plan.widths[later]
            advantage = _incoming(plan, advantages, later, child, since=level)
            color = None if advantage is None else advantage_color(advantage, limit)
            _draw_edge(axes, layout, (level, parent), (later, child), color)
    for level in layout.levels:
        for node in range(plan.widths[level]):
            advantage = _incoming(plan, advantages, level, node)
            style.put_image(
                axes,
                images[level][node],
                layout.point(level, node),
                layout.sizes[level],
                color=advantage_color(advantage or 0.0, limit),
                line_width=1.0 + 2.0 * min(layout.sizes[level]),
                zorder=4,
            )
    _write_rewards(axes, plan, layout, rewards)
    _write_levels(axes, plan, layout, sigmas)
    _write_zones(axes, plan, layout)
    _write_title(axes, plan, prompt)
    _draw_color_bar(axes, layout, limit)
    _write_footer(axes, plan, layout)
    style.save(figure, path)


def _check(
    plan: RolloutPlan,
    images: Mapping[int, Tensor],
    advantages: Mapping[int, Tensor],
    rewards: Tensor,
    sigmas: Sequence[float],
) -> None:
    if plan.steps not in images or len(images) < 2:
        raise ValueError(
            f"images: got levels {sorted(images)}; the leaves' level {plan.steps} and at least one "
            "other are needed"
        )
    for level, tensor in images.items():
        if not 0 <= level <= plan.steps:
            raise ValueError(f"images: got level {level}; must be in 0..{plan.steps}")
        if tensor.ndim != 4 or tensor.shape[:2] != (plan.widths[level], 3):
            raise ValueError(
                f"images[{level}]: got shape {list(tensor.shape)}; must be "
                f"[{plan.widths[level]}, 3, H, W]"
            )
    if not plan.stochastic_steps:
        raise ValueError("plan: got no stochastic step; there are no advantages to draw")
    for step in plan.stochastic_steps:
        shape = list(advantages[step].shape) if step in advantages else None
        if shape != [plan.widths[step + 1]]:
            raise ValueError(
                f"advantages[{step}]: got shape {shape}; must be [{plan.widths[step + 1]}]"
            )
    if rewards.shape != (plan.leaves,):
        raise ValueError(f"rewards: got shape {list(rewards.shape)}; must be [{plan.leaves}]")
    if len(sigmas) != plan.steps + 1:
        raise ValueError(f"sigmas: got {len(sigmas)}; must be {plan.steps + 1}, one per level")


def _incoming(
    plan: RolloutPlan, advantages: Mapping[int, Tensor], level: int, node: int, since: int = 0
) -> float | None:
    """The advantage of the last stochastic edge on the way from level `since` to a node."""
    steps = [step for step in plan.stochastic_steps if since <= step < level]
    if not steps:
        return None
    edge = node * plan.widths[steps[-1] + 1] // plan.widths[level]
    return float(advantages[steps[-1]][edge])


# --- where things stand ---


@dataclass(frozen=True)
class _Layout:
    """Places on the page, in inches from its top left.

    Attributes:
        levels: the drawn ones, in order.
        radii: per level, from the crown's center; below zero is down the trunk.
        angles: per level and node, counted from the horizontal, counterclockwise.
        sizes: per level, its images' width and height.
        half_span: half the crown's angle.
    """

    levels: tuple[int, ...]
    radii: dict[int, float]
    angles: dict[int, list[float]]
    sizes: dict[int, tuple[float, float]]
    half_span: float
    center: Point
    width: float
    height: float

    def polar(self, radius: float, angle: float) -> Point:
        x, y = self.center
        return x + radius * math.cos(angle), y - radius * math.sin(angle)

    def point(self, level: int, node: int) -> Point:
        if self.radii[level] <= 0:
            return self.center[0], self.center[1] - self.radii[level]
        return self.polar(self.radii[level], self.angles[level][node])


def _arrange(plan: RolloutPlan, images: Mapping[int, Tensor]) -> _Layout:
    levels = sorted(images)
    trunk = [level for level in levels[:-1] if plan.widths[level] == 1]
    rings = levels[len(trunk) :]
    radii = {level: -_TRUNK_LEVEL * depth for depth, level in enumerate(reversed(trunk))}
    innermost = _CROWN_RADIUS / len(rings) if trunk else _INNERMOST_RING
    for index, level in enumerate(rings):
        share = index / max(len(rings) - 1, 1)
        radii[level] = innermost + share * (_CROWN_RADIUS - innermost)

    span = min(_CROWN_ANGLE, _LEAF_ANGLE * plan.leaves)
    gaps = [_gap(plan, levels, leaf) for leaf in range(1, plan.leaves)]
    unit = span / (sum(gaps) + 1)
    leaf_angles = [math.pi / 2 + span / 2 - unit / 2]
    for gap in gaps:
        leaf_angles.append(leaf_angles[-1] - gap * unit)
    angles = {}
    for level in levels:
        under = plan.leaves // plan.widths[level]
        angles[level] = [
            (leaf_angles[node * under] + leaf_angles[(node + 1) * under - 1]) / 2
            for node in range(plan.widths[level])
        ]

    height, width = images[plan.steps].shape[-2:]
    shape = (width / max(width, height), height / max(width, height))
    spacing = (_CROWN_RADIUS - innermost) / max(len(rings) - 1, 1) if len(rings) > 1 else 1.0
    sizes = {}
    for level in levels:
        side = min(_LARGEST_IMAGE, 0.7 * spacing if level in rings else _LARGEST_IMAGE)
        for one, next_ in zip(angles[level], angles[level][1:], strict=False):
            # Neighbors on a diagonal are the tightest: squares touch at 0.707 of their distance.
            side = min(side, 0.72 * 2 * radii[level] * math.sin((one - next_) / 2))
        sizes[level] = (side * shape[0], side * shape[1])

    page_width = 2 * (_CROWN_RADIUS + _REWARD_ROOM + 0.2)
    center = (page_width / 2, _MARGIN + _REWARD_ROOM + _CROWN_RADIUS)
    below = max(
        -_CROWN_RADIUS * math.cos(span / 2) + 0.5, -min(radii.values()) + _LARGEST_IMAGE / 2
    )
    return _Layout(
        tuple(levels), radii, angles, sizes, span / 2, center, page_width,
        center[1] + below + _MARGIN + 0.15,
    )  # fmt: skip


def _gap(plan: RolloutPlan, levels: Sequence[int], leaf: int) -> float:
    """Room before a leaf, in units of siblings' distance: more where larger branches meet."""
    parted = sum(
        (leaf - 1) * plan.widths[level] // plan.leaves != leaf * plan.widths[level] // plan.leaves
        for level in {plan.widths[level]: level for level in levels}.values()
    )
    return 1.0 + 0.25 * (parted - 1)


# --- what is drawn ---


def _shade_window(axes: Axes, plan: RolloutPlan, layout: _Layout) -> None:
    start, end = _window_radii(plan, layout)
    degrees = math.degrees(layout.half_span) + 3
    axes.add_patch(
        Wedge(
            layout.center, end, -90 - degrees, -90 + degrees, width=end - start,
            facecolor=style.SHADE, edgecolor="none", zorder=0,
        )
    )  # fmt: skip


def _window_radii(plan: RolloutPlan, layout: _Layout) -> tuple[float, float]:
    first, last = plan.stochastic_steps[0], plan.stochastic_steps[-1] + 1
    before = [layout.radii[level] for level in layout.levels if level <= first]
    after = [layout.radii[level] for level in layout.levels if level >= last]
    return max(max(before, default=0.0), 0.0), max(after[0], 0.0)


def _draw_edge(
    axes: Axes,
    layout: _Layout,
    parent: tuple[int, int],
    child: tuple[int, int],
    color: Color | None,
) -> None:
    """A curve that leaves and arrives radially; deterministic ones are thin, grey and dotted."""
    start, end = layout.point(*parent), layout.point(*child)
    inner, outer = layout.radii[parent[0]], layout.radii[child[0]]
    if outer <= 0:
        curve = Curve([start, end])
    else:
        middle = (max(inner, 0.0) + outer) / 2
        child_angle = layout.angles[child[0]][child[1]]
        parent_angle = layout.angles[parent[0]][parent[1]] if inner > 0 else child_angle
        bends = [layout.polar(middle, parent_angle), layout.polar(middle, child_angle)]
        curve = Curve([start, *bends, end], [Curve.MOVETO] + [Curve.CURVE4] * 3)
    width = 1.2 if color is None else 1.6 + 4 * min(layout.sizes[child[0]])
    axes.add_patch(
        PathPatch(
            curve, facecolor="none", edgecolor=color or style.MUTED, linewidth=width,
            linestyle="-" if color else (0, (1, 1.8)), capstyle="round", zorder=2,
        )
    )  # fmt: skip


def _write_rewards(axes: Axes, plan: RolloutPlan, layout: _Layout, rewards: Tensor) -> None:
    width, height = layout.sizes[plan.steps]
    best = float(rewards.max())
    for angle, reward in zip(layout.angles[plan.steps], rewards.tolist(), strict=True):
        cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
        edge = min(width / 2 / max(cosine, 1e-9), height / 2 / max(sine, 1e-9))
        x, y = layout.polar(_CROWN_RADIUS + edge + 0.06 + 0.15 * cosine + 0.06 * sine, angle)
        axes.text(
            x, y, f"{reward:.2f}", ha="center", va="center", fontsize=8,
            color=style.INK if reward == best else style.MUTED,
            weight="bold" if reward == best else "normal",
        )  # fmt: skip


def _write_levels(axes: Axes, plan: RolloutPlan, layout: _Layout, sigmas: Sequence[float]) -> None:
    for level in layout.levels:
        name = "finished" if level == plan.steps else f"after {level} step{'s' * (level != 1)}"
        text = f"{name if level else 'start'}\n{100 * sigmas[level]:.0f} % noise"
        radius = layout.radii[level]
        if radius <= 0:
            x, y = layout.point(level, 0)
            x, alignment = x + layout.sizes[level][0] / 2 + 0.12, "left"
        else:
            x, y = layout.polar(radius, math.pi / 2 - layout.half_span - 0.06)
            y, alignment = y + 0.2, "center"
        axes.text(
            x, y, text, ha=alignment, va="center", color=style.MUTED, fontsize=8, linespacing=1.3
        )


def _write_zones(axes: Axes, plan: RolloutPlan, layout: _Layout) -> None:
    """Names of the crown's zones along its left edge, and of the trunk beside it."""
    start, end = _window_radii(plan, layout)
    children = max(plan.branching)
    branches = f"every node branches into {children}" if children > 1 else "every step is sampled"
    zones = [((start + end) / 2, "stochastic window", branches)]
    if end < _CROWN_RADIUS:
        zones.append(((end + _CROWN_RADIUS) / 2, "deterministic", "tails"))
    angle = math.pi / 2 + layout.half_span
    for radius, name, detail in zones:
        x, y = layout.polar(radius, angle + 0.05)
        for line, (text, weight) in enumerate(((name, "bold"), (detail, "normal"))):
            offset = 0.16 + 0.17 * line
            axes.text(
                x + offset * math.sin(angle - math.pi) , y + offset * -math.cos(angle), text,
                ha="center", va="center", rotation=math.degrees(angle) - 180,
                rotation_mode="anchor", color=style.INK if line == 0 else style.MUTED, fontsize=9,
                weight=weight,
            )  # fmt: skip
    lowest = min(layout.radii.values())
    if lowest < 0:
        x, y = layout.center
        axes.text(
            x - 0.16, y - lowest / 2, "shared\ndeterministic\nprefix", ha="right", va="center",
            color=style.INK, fontsize=9, weight="bold", linespacing=1.25,
        )  # fmt: skip


def _write_title(axes: Axes, plan: RolloutPlan, prompt: str) -> None:
    trees = "one tree" if plan.roots == 1 else f"{plan.roots} trees"
    axes.text(
        _MARGIN, _MARGIN + 0.14, f"One prompt, {trees}", color=style.INK, fontsize=15,
        weight="bold", va="center",
    )  # fmt: skip
    axes.text(
        _MARGIN, _MARGIN + 0.4, textwrap.fill(f"“{prompt}”", 26, max_lines=4, placeholder=" …”"),
        color=style.MUTED, fontsize=10.5, va="top", linespacing=1.3, parse_math=False,
    )  # fmt: skip


def _draw_color_bar(axes: Axes, layout: _Layout, limit: float) -> None:
    width, height = 1.9, 0.11
    right, top = layout.width - _MARGIN, _MARGIN + 0.34
    colors = [advantage_color(step / 64, 1.0) for step in range(-64, 65)]
    axes.imshow(
        [list(range(len(colors)))], extent=(right - width, right, top + height, top),
        cmap=ListedColormap(colors), aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.text(
        right - width / 2, top - 0.2, "advantage of a branch", color=style.INK, fontsize=9,
        weight="bold", ha="center", va="center",
    )  # fmt: skip
    ends = (
        (right - width, f"−{limit:.1f}\nworse", "left"),
        (right, f"+{limit:.1f}\nbetter", "right"),
    )
    for x, text, alignment in (*ends, (right - width / 2, "0\nas the average", "center")):
        axes.text(
            x, top + height + 0.07, text, color=style.MUTED, fontsize=8, ha=alignment, va="top",
            linespacing=1.35,
        )  # fmt: skip


def _write_footer(axes: Axes, plan: RolloutPlan, layout: _Layout) -> None:
    text = (
        "Each small image is the model's guess of the\nfinished one at that point. "
        "The numbers at the\nleaves are their rewards."
    )
    axes.text(
        _MARGIN, layout.height - _MARGIN, text, color=style.MUTED, fontsize=9, va="bottom",
        linespacing=1.4,
    )  # fmt: skip
