"""Numbers and times as people read them.

Left out: the tables, lines and pictures that hold them (`report/`, `console.py`).
"""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Its largest units: "2.4 s", "3 min 12 s", "25 min", "2 h 5 min", "1 d 2 h"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 599.5:
        return _units(round(seconds), 60, "min", "s")
    if seconds < 3570:
        return f"{seconds / 60:.0f} min"
    if seconds < 86370:
        return _units(round(seconds / 60), 60, "h", "min")
    return _units(round(seconds / 3600), 24, "d", "h")


def _units(count: int, size: int, large: str, small: str) -> str:
    many, few = divmod(count, size)
    return " ".join(f"{n} {unit}" for n, unit in ((many, large), (few, small)) if n)


def number(value: float, error: float | None = None, sign: str = "-") -> str:
    """With the digits that its standard error warrants, or about five where there is none."""
    if error and error >= 1e-6:
        places = min(max(1 - math.floor(math.log10(error)), 0), 6)
        return f"{value:{sign}.{places}f}"
    if 0 < abs(value) < 0.01:
        return f"{value:{sign}.3g}"
    before_point = len(str(int(abs(value)))) if math.isfinite(value) else 1
    return f"{value:{sign}.{max(5 - before_point, 0)}f}"


def counted(count: int, noun: str) -> str:
    """As in "1 prompt" and "2 prompts"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def with_error(value: float, error: float | None, sign: str = "-") -> str:
    """A mean and its standard error, if it has one."""
    return number(value, error, sign) + (f" ± {number(error, error)}" if error else "")
