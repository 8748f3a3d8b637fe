"""The picture of one prompt's forest, drawn as a tree.

The deterministic prefix that all leaves share is the trunk; from its top the levels are rings of a
crown, and a node stands at the middle of its leaves, so lines do not cross. Independent roots
share nothing, so they have no trunk: their first level is the innermost ring.

Left out: the palette and how images are put on a page (`style.py`).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import PathPatch, Wedge
from matplotlib.path import Path as Curve
from torch import Tensor

from treegrpo.plan import RolloutPlan
from treegrpo.report import style

Color = tuple[float, float, float]

# Inches.
_MARGIN = 0.3
_CROWN_RADIUS = 4.08
_INNERMOST_RING = 1.2
_TRUNK_LEVEL = 2.0
_REWARD_ROOM = 0.52
_LARGEST_IMAGE = 0.66
_FOOTER = 0.5

_CROWN_ANGLE = math.radians(240)
_LEAF_ANGLE = math.radians(30)
"""At most, so that a crown of few leaves is narrow."""


def advantage_color(advantage: float, limit: float) -> Color:
    """An edge's red, green and blue in [0, 1]: grey at 0, green at `limit`, orange at `-limit`."""
    share = min(abs(advantage) / limit, 1.0) ** 0.75 if limit > 0 else 0.0
    ends = zip(
        to_rgb(style.NEUTRAL), to_rgb(style.GOOD if advantage > 0 else style.BAD), strict=True
    )
    red, green, blue = (neutral + share * (end - neutral) for neutral, end in ends)
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
        path: the file; its folder is made.
        images: the levels to draw: level t (0..T, T the leaves) to float [widths[t], 3, H, W] in
            [0, 1]. The leaves and at least one other level are needed.
        advantages: every stochastic step to float [widths[step + 1]], one value per edge.
        rewards: float [leaves].
        sigmas: T + 1 noise levels, from 1 (all noise) down to 0.

    Raises:
        ValueError: a level, a step or a shape does not fit the plan.
    """
    _check(plan, images, advantages, rewards, sigmas)
    height, width = images[plan.steps].shape[-2:]
    layout = _arrange(plan, sorted(images), width / height)
    limit = max(float(advantages[step].abs().max()) for step in plan.stochastic_steps)
    figure, axes = style.page(layout.width, layout.height)

    _shade_window(axes, layout)
    for level, later in zip(layout.levels, layout.levels[1:], strict=False):
        for child in range(plan.widths[later]):
            parent = child * plan.widths[level] // plan.widths[later]
            advantage = _incoming(plan, advantages, later, child, since=level)
            color = None if advantage is None else advantage_color(advantage, limit)
            _draw_edge(axes, layout, (level, parent), (later, child), color)
    for level, size in layout.sizes.items():
        for node, image in enumerate(images[level]):
            color = advantage_color(_incoming(plan, advantages, level, node) or 0.0, limit)
            point, line_width = layout.point(level, node), 1.0 + 2.0 * min(size)
            style.put_image(axes, image, point, size, color=color, line_width=line_width, zorder=4)
    _write_rewards(axes, layout, rewards)
    _write_levels(axes, layout, sigmas)
    _write_zones(axes, layout)
    _write_texts(axes, layout, prompt)
    _draw_color_bar(axes, layout, limit)
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
    lists = {
        f"advantages[{step}]": (advantages.get(step), plan.widths[step + 1])
        for step in plan.stochastic_steps
    }
    for name, (values, size) in {**lists, "rewards": (rewards, plan.leaves)}.items():
        shape = None if values is None else list(values.shape)
        if shape != [size]:
            raise ValueError(f"{name}: got shape {shape}; must be [{size}]")
    if len(sigmas) != plan.steps + 1:
        raise ValueError(f"sigmas: got {len(sigmas)}; must be {plan.steps + 1}, one per level")


def _incoming(
    plan: RolloutPlan, advantages: Mapping[int, Tensor], level: int, node: int, since: int = 0
) -> float | None:
    """The advantage of the last stochastic edge on the way from level `since` to a node."""
    step = max((step for step in plan.stochastic_steps if since <= step < level), default=None)
    if step is None:
        return None
    return float(advantages[step][node * plan.widths[step + 1] // plan.widths[level]])


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

    plan: RolloutPlan
    levels: list[int]
    radii: dict[int, float]
    angles: dict[int, list[float]]
    sizes: dict[int, tuple[float, float]]
    half_span: float
    center: style.Pair
    width: float
    height: float

    def polar(self, radius: float, angle: float) -> style.Pair:
        x, y = self.center
        return x + radius * math.cos(angle), y - radius * math.sin(angle)

    def point(self, level: int, node: int) -> style.Pair:
        if self.radii[level] <= 0:
            return self.center[0], self.center[1] - self.radii[level]
        return self.polar(self.radii[level], self.angles[level][node])


def _arrange(plan: RolloutPlan, levels: list[int], aspect: float) -> _Layout:
    trunk = [level for level in levels[:-1] if plan.widths[level] == 1]
    rings = levels[len(trunk) :]
    radii = {level: -_TRUNK_LEVEL * depth for depth, level in enumerate(reversed(trunk))}
    for index, level in enumerate(rings):
        share = index / max(len(rings) - 1, 1)
        radii[level] = _INNERMOST_RING + share * (_CROWN_RADIUS - _INNERMOST_RING)

    span = min(_CROWN_ANGLE, _LEAF_ANGLE * plan.leaves)
    gaps = [_gap(plan, leaf) for leaf in range(1, plan.leaves)]
    unit = span / (sum(gaps) + 1)
    leaf_angles = [math.pi / 2 + span / 2 - unit / 2]
    for gap in gaps:
        leaf_angles.append(leaf_angles[-1] - gap * unit)
    angles = {}
    for level in levels:
        under = plan.leaves // plan.widths[level]
        firsts, lasts = leaf_angles[::under], leaf_angles[under - 1 :: under]
        angles[level] = [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]

    spacing = (_CROWN_RADIUS - _INNERMOST_RING) / max(len(rings) - 1, 1)
    sizes = {}
    for level in levels:
        side = _LARGEST_IMAGE if level in trunk else min(_LARGEST_IMAGE, 0.68 * spacing)
        for one, other in zip(angles[level], angles[level][1:], strict=False):
            across = abs(math.cos(one) - math.cos(other))
            along = abs(math.sin(one) - math.sin(other))
            side = min(side, 0.95 * radii[level] * max(across, along))
        sizes[level] = (side * min(aspect, 1.0), side / max(aspect, 1.0))

    reach = _CROWN_RADIUS + max(sizes[plan.steps]) / 2 + _REWARD_ROOM
    center = (reach, _MARGIN / 2 + reach)
    below = max(0.55 - _CROWN_RADIUS * math.cos(span / 2), 0.65 - min(radii.values()))
    height = center[1] + below + _FOOTER + _MARGIN
    return _Layout(plan, levels, radii, angles, sizes, span / 2, center, 2 * reach, height)


def _gap(plan: RolloutPlan, leaf: int) -> float:
    """Room before a leaf, in units of siblings' distance: more where larger branches meet."""
    meeting = sum(leaf % (plan.leaves // width) == 0 for width in set(plan.widths))
    return 1.0 + 0.15 * (meeting - 1)


# --- what is drawn ---


def _shade_window(axes: Axes, layout: _Layout) -> None:
    start, end = _window_radii(layout)
    degrees = math.degrees(layout.half_span) + 3
    wedge = Wedge(layout.center, end, -90 - degrees, -90 + degrees, width=end - start, zorder=0)
    wedge.set(facecolor=style.SHADE, edgecolor="none")
    axes.add_patch(wedge)


def _window_radii(layout: _Layout) -> tuple[float, float]:
    steps = layout.plan.stochastic_steps
    first, last = steps[0], steps[-1] + 1
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
    patch = PathPatch(curve, facecolor="none", capstyle="round", zorder=2)
    if color is None:
        patch.set(edgecolor=style.MUTED, linewidth=1.2, linestyle=(0, (1, 1.8)))
    else:
        patch.set(edgecolor=color, linewidth=1.6 + 4 * min(layout.sizes[child[0]]))
    axes.add_patch(patch)


def _write_rewards(axes: Axes, layout: _Layout, rewards: Tensor) -> None:
    leaves = layout.plan.steps
    width, height = layout.sizes[leaves]
    best = float(rewards.max())
    for angle, reward in zip(layout.angles[leaves], rewards.tolist(), strict=True):
        cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
        to_frame = min(width / 2 / max(cosine, 1e-9), height / 2 / max(sine, 1e-9))
        radius = _CROWN_RADIUS + to_frame + 0.06 + 0.15 * cosine + 0.06 * sine
        is_best = reward == best
        color, point = style.INK if is_best else style.MUTED, layout.polar(radius, angle)
        text = f"{reward:.2f}"
        style.write(axes, point, text, size=8, color=color, bold=is_best, align="center")


def _write_levels(axes: Axes, layout: _Layout, sigmas: Sequence[float]) -> None:
    """How far each drawn level is, right of the trunk and along the crown's right edge."""
    for level in layout.levels:
        name = "start" if level == 0 else f"after {level} step{'s' * (level > 1)}"
        if level == layout.plan.steps:
            name = "finished"
        text = f"{name}\n{100 * sigmas[level]:.0f} % noise"
        radius = layout.radii[level]
        if radius > 0:
            x, y = layout.polar(radius, math.pi / 2 - layout.half_span - 0.06)
            style.write(axes, (x, y + 0.24), text, size=8, color=style.MUTED, align="center")
            continue
        x, y = layout.point(level, 0)
        width, height = layout.sizes[level]
        # Below the topmost, whose sides may be taken by the crown.
        dx, dy = (0.12, height / 2 + 0.18) if radius == 0 else (width / 2 + 0.12, 0.0)
        style.write(axes, (x + dx, y + dy), text, size=8, color=style.MUTED)


def _write_zones(axes: Axes, layout: _Layout) -> None:
    """The names of the window, the tails and the prefix.

    The first two stand along the crown's left edge, the third on the left of the trunk.
    """
    _, end = _window_radii(layout)
    angle = math.pi / 2 + layout.half_span
    rotation = math.degrees(angle) - 180

    def along_edge(radius: float, lines: Sequence[str], align: Literal["left", "right"]) -> None:
        x, y = layout.polar(radius, angle + math.radians(3))
        for index, line in enumerate(lines):
            down = 0.15 + 0.17 * index
            point = (x + down * math.sin(angle - math.pi), y - down * math.cos(angle))
            color = style.MUTED if index else style.INK
            style.write(
                axes, point, line, color=color, bold=not index, align=align, rotation=rotation
            )

    children = max(layout.plan.branching)
    detail = f"every node branches into {children}" if children > 1 else "every step is random"
    along_edge(end - 0.05, ("stochastic window", detail), "left")
    if end < _CROWN_RADIUS:
        along_edge(end + 0.1, ("deterministic", "tails"), "right")
    lowest = min(layout.radii.values())
    if lowest < 0:
        point = (layout.center[0] - 0.14, layout.center[1] - lowest - 0.68)
        style.write(axes, point, "shared\ndeterministic\nprefix", bold=True, align="right")


def _write_texts(axes: Axes, layout: _Layout, prompt: str) -> None:
    roots = layout.plan.roots
    trees = "one tree" if roots == 1 else f"{roots} trees"
    style.write(axes, (_MARGIN, _MARGIN + 0.14), f"One prompt, {trees}", size=15, bold=True)
    quoted = textwrap.fill(f"“{prompt}”", 24, max_lines=3, placeholder=" …”")
    point = (_MARGIN, _MARGIN + 0.38)
    style.write(axes, point, quoted, size=10.5, color=style.MUTED, valign="top")
    point = (layout.width / 2, layout.height - _MARGIN)
    text = (
        "Each small image is the model's guess, at that point, of the finished one.\n"
        "The numbers are the rewards of the finished ones."
    )
    style.write(axes, point, text, color=style.MUTED, align="center", valign="bottom")


def _draw_color_bar(axes: Axes, layout: _Layout, limit: float) -> None:
    width, height = 1.75, 0.1
    right, top = layout.width - _MARGIN, _MARGIN + 0.3
    colors = [advantage_color(step / 64, 1.0) for step in range(-64, 65)]
    bar, extent = [list(range(len(colors)))], (right - width, right, top + height, top)
    axes.imshow(bar, ListedColormap(colors), aspect="auto", interpolation="nearest", extent=extent)
    title = (right - width / 2, top - 0.18)
    style.write(axes, title, "advantage of a branch", bold=True, align="center")
    y = top + height + 0.14
    style.write(axes, (right - width, y), f"worse {-limit:.1f}", size=8, color=style.MUTED)
    style.write(axes, (right, y), f"+{limit:.1f} better", size=8, color=style.MUTED, align="right")
