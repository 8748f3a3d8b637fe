"""Errors that are the user's to correct; the command line prints them without a traceback.

Left out: mistakes of ours, which keep their tracebacks.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).parent


class UserError(ValueError):
    """Something given to the library is wrong; the message names it and says what is allowed."""


def reason(error: BaseException) -> str:
    """Another error's class and the first line of its message, to be told within ours."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def own_traceback(error: BaseException) -> str:
    """Where in the user's code an error was raised, as lines to be put below a message.

    Frames of this package and of Python's imports are left out; "" where no others are left.
    """
    told = traceback.TracebackException.from_exception(error)
    lines = traceback.StackSummary.from_list(
        [
            frame
            for frame in told.stack
            if not Path(frame.filename).is_relative_to(_PACKAGE)
            and not frame.filename.startswith("<frozen importlib")
            and not frame.filename.endswith("/importlib/__init__.py")
        ]
    ).format()
    if isinstance(error, SyntaxError):  # which has no frame of its own
        lines += list(told.format_exception_only())[:-1]
    return "".join(f"\n{line.rstrip()}" for line in lines)


class Problems:
    """Refusals that are collected, so that one start tells them all."""

    def __init__(self) -> None:
        self._found: list[Exception] = []

    @contextmanager
    def collecting(self, *others: type[Exception]) -> Iterator[None]:
        """A UserError, or one of the other kinds, ends what is inside and is kept."""
        kinds: tuple[type[Exception], ...] = (UserError, *others)
        try:
            yield
        except kinds as error:
            self._found.append(error)

    def refuse(self) -> None:
        """Raise what was kept: a single one as it is, several together.

        Raises:
            UserError: or of the other kind.
        """
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            each = [getattr(error, "problems", [str(error)]) for error in self._found]
            raise UserError(together("there are", [one for problems in each for one in problems]))


def together(head: str, problems: Sequence[str]) -> str:
    """A message of several problems, each on lines of its own.

    Args:
        head: what has them, with a verb.
    """
    indented = "".join("\n  " + problem.replace("\n", "\n  ") for problem in problems)
    return f"{head} {len(problems)} problems:{indented}"
