"""Fonts for whatever letters a prompt has, and lines broken by their width as drawn.

Left out: where a text stands on the page (`style.py`).
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager, get_font

_OWN = "DejaVu Sans"  # comes with matplotlib
# Of several that have a letter, these are meant for reading.
_PREFERRED = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC", "Hiragino Sans GB"),
    *("Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS", "Noto Sans Devanagari"),
    *("Noto Sans Thai", "Noto Emoji", "Symbola", "Segoe UI Emoji"),
)
_NOT_FOR_READING = ("Last Resort", "STIX", "cm", ".")
# They choose between forms of the letter before them.
_INVISIBLE = {"\u200d", "\ufe0e", "\ufe0f"}
_DPI = 200


def drawn(text: str) -> str:
    """Without what only chooses between forms of a letter, which would be drawn as a box."""
    return "".join(letter for letter in text if letter not in _INVISIBLE)


def families(text: str) -> list[str]:
    """The font of matplotlib, and installed ones for the letters that it lacks."""
    found = (_family_of(letter) for letter in sorted(_special(text)))
    return list(dict.fromkeys([_OWN, *filter(None, found)]))


def without_font(text: str) -> list[str]:
    """Names of the scripts whose letters no installed font has."""
    missing = (letter for letter in sorted(_special(text)) if _family_of(letter) is None)
    return list(dict.fromkeys(filter(None, map(_script, missing))))


def width(text: str, size: float, *, bold: bool = False) -> float:
    """Inches that a line takes; `size` is in points."""
    weight = "bold" if bold else "normal"
    font = FontProperties(family=families(text), size=size, weight=weight)
    with boxes_allowed():
        pixels, _, _ = _renderer().get_text_width_height_descent(text, font, False)
    return float(pixels) / _DPI


@contextmanager
def boxes_allowed() -> Iterator[None]:
    """Without a warning for each letter that no font has, which is drawn as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def fitting(text: str, size: float, room: float, *, bold: bool = False) -> float:
    """The size in points, up to `size`, at which a line takes at most `room` inches."""
    return size * min(1.0, room / max(width(text, size, bold=bold), 1e-9))


def wrap(text: str, size: float, room: float, max_lines: int) -> str:
    """Lines of at most `room` inches, broken at spaces and between wide letters.

    What does not fit into `max_lines` is left out, which an ellipsis shows.
    """
    lines = [""]
    for space, piece in _pieces(drawn(text)):
        joined = lines[-1] + space * bool(lines[-1]) + piece
        if width(joined, size) <= room:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in piece:  # of a piece that is wider than a line, all but the last fill lines
            if lines[-1] and width(lines[-1] + letter, size) > room:
                lines.append("")
            lines[-1] += letter
        if len(lines) > max_lines:
            break
    if len(lines) <= max_lines:
        return "\n".join(lines)
    last = lines[max_lines - 1]
    while last and width(last + " …", size) > room:
        last = last[:-1]
    return "\n".join([*lines[: max_lines - 1], last.rstrip() + " …"])


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """What stays together on a line, and the space before it."""
    for word in text.split():
        space, piece = " ", ""
        for letter in word:
            is_wide = unicodedata.east_asian_width(letter) in "WF"
            closes = unicodedata.category(letter).startswith("P")
            if piece and is_wide and not closes:
                yield space, piece
                space, piece = "", ""
            piece += letter
        yield space, piece


@cache
def _renderer() -> Any:
    make: Any = RendererAgg
    return make(1, 1, _DPI)


def _special(text: str) -> set[str]:
    """The letters that matplotlib's font lacks."""
    return {
        letter
        for letter in set(drawn(text))
        if letter > "\x7f" and ord(letter) not in _letters(_OWN)
    }


@cache
def _family_of(letter: str) -> str | None:
    return next((name for name in _families() if ord(letter) in _letters(name)), None)


@cache
def _families() -> list[str]:
    """The ones that read best first."""
    names = {name for name in _installed() if not name.startswith(_NOT_FOR_READING)}
    others = sorted(names.difference(_PREFERRED), key=lambda name: ("Sans" not in name, name))
    return [*(name for name in _PREFERRED if name in names), *others]


@cache
def _installed() -> dict[str, str]:
    """Family to a file of its upright letters."""
    known = {str(font.fname) for font in fontManager.ttflist}
    # Matplotlib keeps a list, and does not look for what has been installed since.
    for path in findSystemFonts():
        if str(path) not in known:
            with suppress(Exception):  # a damaged or strange file is none of our business
                fontManager.addfont(path)
    upright = [font for font in fontManager.ttflist if font.style == "normal"]
    # The last one of a family stays: that of the usual weight.
    upright.sort(key=lambda font: str(font.weight) in ("400", "normal", "regular"))
    return {font.name: str(font.fname) for font in upright}


@cache
def _letters(family: str) -> frozenset[int]:
    """Of a font with outlines; pictures of letters cannot be drawn."""
    try:
        font = get_font(_installed()[family])
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except Exception:  # as above
        return frozenset()


def _script(letter: str) -> str:
    """Empty for what is no letter and no symbol."""
    category = unicodedata.category(letter)
    if category == "So":
        return "symbols"
    name = unicodedata.name(letter, "").partition(" ")[0] if category[0] == "L" else ""
    return name if name == "CJK" else name.capitalize()
