"""What all pictures share: the palette, the page, and how one image is put on it.

Figures are made without pyplot, so nothing global changes. Their backgrounds are opaque, so that
they also read on dark pages.

Left out: what is drawn (`pictures.py`, `curve.py`, `tree.py`), and its fonts (`fonts.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray
from torch import Tensor

from treegrpo.report import fonts

Pair = tuple[float, float]
"""Inches: a point from the page's top left, or width and height."""

PAPER = "#ffffff"
INK = "#1f2a37"
MUTED = "#6b7685"
RULE = "#dfe3e8"
SHADE = "#eef1f6"
NEUTRAL = "#c5cbd3"
GOOD = "#0b8f78"
BAD = "#dd5f33"
ACCENT = "#3d5a98"
SERIES = (ACCENT, GOOD, BAD, "#8a5fb5", "#b8860b", MUTED)
"""Colors of lines that share a panel."""

PAGE_WIDTH = 9.4
"""Inches; at 900 pixels a 10 point letter is then 13 pixels high."""
DPI = 200
LARGEST_IMAGE = 400
"""Pixels of an image's longer side in the file."""
LARGEST_PAGE = 30_000
"""Pixels of a page's longer side; Agg allows 65,535."""


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """A page of so many inches, and axes that cover it in inches from the top left."""
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_autoscale_on(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dpi = min(DPI, LARGEST_PAGE / max(figure.get_size_inches()))
    with fonts.boxes_allowed():
        figure.savefig(path, dpi=dpi, format="png", facecolor=PAPER)


def write(
    axes: Axes,
    point: Pair,
    text: str,
    *,
    size: float = 9,
    color: str = INK,
    bold: bool = False,
    align: Literal["left", "center", "right"] = "left",
    valign: Literal["top", "center", "baseline", "bottom"] = "center",
    rotation: float = 0.0,
) -> None:
    """Write text (never read as mathematics, whatever a prompt contains) at a point in inches."""
    axes.text(
        *point,
        fonts.drawn(text),
        fontsize=size,
        fontfamily=fonts.families(text),
        color=color,
        weight="bold" if bold else "normal",
        ha=align,
        va=valign,
        rotation=rotation,
        rotation_mode="anchor",
        linespacing=1.3,
        parse_math=False,
    )


def pixels(image: Tensor) -> NDArray[np.float32]:
    """An image, float [3, H, W] in [0, 1], to [H, W, 3], reduced to `LARGEST_IMAGE`."""
    image = image.detach().float().cpu().clamp(0, 1)
    factor = LARGEST_IMAGE / max(image.shape[1:])
    if factor < 1:
        size = [max(round(side * factor), 1) for side in image.shape[1:]]
        image = torch.nn.functional.interpolate(
            image[None], size=size, mode="bilinear", antialias=True
        )[0]
    array: NDArray[np.float32] = image.permute(1, 2, 0).numpy()
    return array


def put_image(
    axes: Axes,
    image: Tensor,
    center: Pair,
    size: Pair,
    *,
    color: str | tuple[float, float, float] = RULE,
    line_width: float = 1.0,
    zorder: float = 3.0,
) -> None:
    """Draw one image with a frame of `color`, its corners rounded; center and size in inches."""
    (x, y), (width, height) = center, size
    left, top = x - width / 2, y - height / 2
    box = f"round,pad=0,rounding_size={0.07 * min(size)}"
    frame = FancyBboxPatch((left, top), width, height, box, facecolor="none", edgecolor=color)
    frame.set(linewidth=line_width, zorder=zorder + 0.1)
    axes.add_patch(frame)
    extent = (left, left + width, top + height, top)
    artist = axes.imshow(pixels(image), aspect="auto", interpolation="catrom", extent=extent)
    artist.set(zorder=zorder, clip_path=frame)
