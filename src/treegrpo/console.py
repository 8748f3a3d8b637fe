"""What a training run shows while it works: live lines on a terminal, plain lines elsewhere.

Left out: records on disk (`tracking.py`) and tables of evaluations (`report/`).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from treegrpo.readable import duration, number


def plain_console() -> Console:
    """Standard output as it is, with lines of 120 letters where it is no terminal."""
    console = Console(markup=False, highlight=False)
    wide = None if console.is_terminal else max(120, console.width)
    return Console(markup=False, highlight=False, width=wide)


# These may end in a refusal, which is a line alone; only a terminal shows them.
_REFUSING = {"loading rewards", "opening the checkpoint", "checking files"}


class Phase(Protocol):
    """Something to be told of."""

    def __call__(self, name: str, detail: str = "") -> None:
        """What begins, and how far it is."""


def silent(name: str, detail: str = "") -> None:
    """A `Phase` that nobody watches."""


class Display:
    """A run's phases, iterations and time left.

    Use as a context manager. On a terminal two lines at its bottom are always up to date; elsewhere
    each iteration is a line, and so is the first time of each phase, which shows what a large model
    is busy with before its first iteration is done.
    """

    def __init__(self, iterations: int, *, enabled: bool = True) -> None:
        self._console = Console(quiet=not enabled, highlight=False, markup=False)
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = enabled and terminal
        self._iterations = iterations
        self._told: set[str] = set()
        self._progress = Progress(
            TextColumn("iteration {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[pace]}"),
            expand=True,
        )
        self._work = Progress(
            SpinnerColumn(), TextColumn("{task.description}  {task.fields[figures]}")
        )
        self._run = self._progress.add_task("", total=iterations, pace="")
        self._phase = self._work.add_task("starting", total=None, figures="")
        self._name, self._detail, self._began = "starting", "", time.monotonic()
        self._screen = Live(
            get_renderable=self._lines, console=self._console, transient=True, refresh_per_second=4
        )

    def __enter__(self) -> Display:
        if self._live:
            self._screen.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._screen.stop()

    def _lines(self) -> Group:
        busy = duration(int(time.monotonic() - self._began))
        words = [self._name, self._detail, busy]
        self._work.update(self._phase, description=" ".join(filter(None, words)))
        return Group(self._progress, self._work)

    def resume(self, iteration: int) -> None:
        """Begin after so many iterations."""
        self._progress.update(self._run, completed=iteration)

    def phase(self, name: str, detail: str = "") -> None:
        """Show what the run does from now on."""
        if name not in self._told | _REFUSING and not self._live:
            self.note(f"{name} {detail}".rstrip())
        self._told.add(name)
        if name != self._name:
            self._began = time.monotonic()
        self._name, self._detail = name, detail

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line that stays, with the time of day."""
        self.say(f"{time.strftime('%H:%M:%S')} {text}")

    def warn(self, warnings: list[str]) -> None:
        """Say what is in a list, and empty it."""
        while warnings:
            self.say(f"warning: {warnings.pop(0)}")

    def show(self, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Show where an iteration's record has brought the run."""
        figures = f"reward {number(metrics['reward'])}"
        if "accuracy" in metrics:
            figures += f"  accuracy {metrics['accuracy']:.0%}"
        done, pace = int(metrics["iteration"]) + 1, duration(metrics["seconds"])
        left = f"left {duration(seconds_left)}"
        self._progress.update(self._run, completed=done, pace=f"{pace} each, {left}")
        self._work.update(self._phase, figures=f"│ last {figures}")
        if not self._live:
            self.note(f"iteration {done}/{self._iterations}  {figures}  {pace}  {left}")

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print rows of cells; the header may be empty."""
        table = Table(title=title, title_justify="left", show_header=bool(header))
        for name in header or rows[0]:
            # A path cut short would be of no use.
            table.add_column(name if header else "", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)


@dataclass
class Stop:
    """Whether the run was asked to end.

    Attributes:
        requested: after the iteration, by the first Ctrl-C.
    """

    requested: bool = False
    _say: Callable[[str], None] = print
    _held: bool = field(default=False, init=False)
    _at_once: bool = field(default=False, init=False)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish what happens inside, and only then end at once, if that was asked for."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._at_once:
            raise KeyboardInterrupt

    def ask(self) -> None:
        """Ask once more.

        Raises:
            KeyboardInterrupt: it is not the first time, and nothing is being written.
        """
        if not self.requested:
            self.requested = True
            self._say("stopping after this iteration; press Ctrl-C again to stop at once")
        elif self._held:
            self._at_once = True
            self._say("stopping once this is written")
        else:
            raise KeyboardInterrupt


@contextmanager
def stop_signal(say: Callable[[str], None]) -> Iterator[Stop]:
    """The first Ctrl-C asks the loop to end after its iteration; the second one interrupts it."""
    stop = Stop(_say=say)

    def handle(signal_number: int, frame: Any) -> None:
        stop.ask()

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: leave signals to whoever owns them
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
