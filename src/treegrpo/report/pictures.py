"""Grids of samples: those of a few prompts, or the same ones before and after training.

Left out: the training curve (`curve.py`), the picture of a tree (`tree.py`), the page of
`treegrpo evaluate` (`comparison.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

from treegrpo.report import fonts, style

# Inches.
_MARGIN = 0.3
_GAP = 0.1
_ROW_GAP = 0.18
_IMAGE_SIDES = (0.4, 1.4)
_LINE = 0.19
_PROMPT_SIZE = 10  # points


@dataclass(frozen=True)
class Headline:
    """What a picture says above its images: a figure's name, and its values before and after."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class _Block:
    """Images that stand side by side in every row, and what is written above them.

    Attributes:
        images: float [prompts, n, 3, H, W] in [0, 1].
        correct: bool [prompts, n].
        figure: written large.
    """

    images: Tensor
    label: str = ""
    correct: Tensor | None = None
    figure: str = ""


def image_grid(path: Path, prompts: Sequence[str], images: Tensor) -> None:
    """Write a PNG with each prompt's text and its images, [prompts, n, 3, H, W] in [0, 1].

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
    headline: Headline | None = None,
) -> None:
    """Write a PNG with each prompt's text, its images before, its images after.

    Args:
        path: the file; its folder is made.
        before, after: float [prompts, n, 3, H, W] in [0, 1].
        correct_before, correct_after: bool [prompts, n], which images show what their prompt says
            (a green frame and a check; else a red one and a cross); None: unknown.
        label_after: what the later images are called.

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
    headline = headline or Headline("", "", "")
    blocks = [
        _Block(before, "before training", correct_before, headline.before),
        _Block(after, label_after, correct_after, headline.after),
    ]
    _draw_grid(path, prompts, blocks, headline.name)


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


@dataclass(frozen=True)
class _Layout:
    """Sizes on the page, in inches.

    Rows of few images stand in two stacks side by side, or the page would be long and thin.
    """

    stacks: int
    rows: int
    text: float
    image: style.Pair
    block: float
    block_gap: float

    @staticmethod
    def of(prompts: int, blocks: int, columns: int, aspect: float) -> _Layout:
        """For images whose height is `aspect` times their width, as wide as the page allows."""
        stacks = 2 if blocks * columns <= 2 and prompts >= 4 else 1
        text, block_gap = (2.0, 0.4) if columns > 1 or stacks == 1 else (1.5, _GAP)
        room = (style.PAGE_WIDTH - 2 * _MARGIN - (stacks - 1) * 0.4) / stacks - text
        room -= (blocks - 1) * block_gap + blocks * (columns - 1) * _GAP
        width = min(max(room / (blocks * columns), _IMAGE_SIDES[0]), _IMAGE_SIDES[1])
        block = columns * width + (columns - 1) * _GAP
        rows = math.ceil(prompts / stacks)
        return _Layout(stacks, rows, text, (width, width * aspect), block, block_gap)

    def width(self, blocks: int) -> float:
        """Of a stack: the prompts and their images."""
        return self.text + blocks * self.block + (blocks - 1) * self.block_gap


def _draw_grid(
    path: Path, prompts: Sequence[str], blocks: Sequence[_Block], name: str = ""
) -> None:
    columns, pixel_height, pixel_width = (blocks[0].images.shape[axis] for axis in (1, 3, 4))
    layout = _Layout.of(len(prompts), len(blocks), columns, pixel_height / pixel_width)
    has_figure = any(block.figure for block in blocks)
    header = (0.68 if has_figure else 0.36) if blocks[0].label else 0.0
    judged = any(block.correct is not None for block in blocks)
    missing = fonts.without_font("".join(prompts))
    top, row_height = _MARGIN + header, layout.image[1] + _ROW_GAP
    bottom = top + layout.rows * row_height - _ROW_GAP
    stack = layout.width(len(blocks))
    width = 2 * _MARGIN + layout.stacks * stack + (layout.stacks - 1) * 0.4
    height = bottom + 0.45 * judged + 0.4 * bool(missing) + _MARGIN
    figure, axes = style.page(width, height)
    for index, prompt in enumerate(prompts):
        number, row = divmod(index, layout.rows)
        left = _MARGIN + number * (stack + 0.4)
        middle = top + row * row_height + layout.image[1] / 2
        if row == 0 and header:
            _write_headers(axes, blocks, layout, name if number == 0 else "", (left, top))
        lines = max(int(layout.image[1] / _LINE), 1)
        text = fonts.wrap(prompt, _PROMPT_SIZE, layout.text - 0.15, lines)
        style.write(axes, (left, middle), text, size=_PROMPT_SIZE)
        left += layout.text + layout.image[0] / 2
        for block in blocks:
            for column, image in enumerate(block.images[index]):
                right = None if block.correct is None else bool(block.correct[index, column])
                x = left + column * (layout.image[0] + _GAP)
                _put_judged(axes, image, right, (x, middle), layout.image)
            left += layout.block + layout.block_gap
    if judged:
        bottom += 0.45
        _write_legend(axes, _MARGIN + (layout.text if layout.stacks == 1 else 0), bottom, width)
    if missing:
        _write_missing(axes, missing, bottom + 0.4, width)
    style.save(figure, path)


def _write_headers(
    axes: Axes, blocks: Sequence[_Block], layout: _Layout, name: str, corner: style.Pair
) -> None:
    """The figure's name above the prompts, and above each block its value and what it is."""
    left, top = corner
    text = fonts.wrap(name, 8, layout.text - 0.15, 4)
    style.write(axes, (left, top - 0.2), text, size=8, color=style.MUTED, valign="bottom")
    left += layout.text
    for block in blocks:
        y = top - 0.24
        if block.figure:
            size = fonts.fitting(block.figure, 16, layout.block, bold=True)
            point = (left, y)
            style.write(axes, point, block.figure, size=size, bold=True, valign="baseline")
            y -= 0.3
        size = fonts.fitting(block.label, 11, layout.block)
        style.write(axes, (left, y), block.label, size=size, color=style.MUTED, valign="baseline")
        axes.plot([left, left + layout.block], [top - 0.14] * 2, color=style.RULE, linewidth=1)
        left += layout.block + layout.block_gap


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


def _write_legend(axes: Axes, x: float, y: float, page_width: float) -> None:
    x = min(x, page_width - 4.5)
    for right, text in ((True, "exactly what the prompt says"), (False, "something is wrong")):
        _put_mark(axes, right, x + 0.08, y)
        style.write(axes, (x + 0.24, y), text, color=style.MUTED)
        x += 2.5


def _write_missing(axes: Axes, scripts: Sequence[str], y: float, page_width: float) -> None:
    text = (
        f"No font of this machine has some of the letters ({', '.join(scripts)}), so boxes stand "
        "for them. Google's Noto fonts have most letters there are."
    )
    room = page_width - 2 * _MARGIN
    text = fonts.wrap(text, 8, room, 2)
    style.write(axes, (_MARGIN, y), text, size=8, color=style.MUTED)
