"""What a training run shows while it works: a live line on a terminal, plain lines elsewhere.

Left out: records on disk (`tracking.py`) and tables of evaluations (`report/`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def plain_console() -> Console:
    """Standard output as it is, with lines of 120 letters where it is no terminal."""
    console = Console(markup=False, highlight=False)
    wide = None if console.is_terminal else max(120, console.width)
    return Console(markup=False, highlight=False, width=wide)


class Display:
    """Progress over a run's iterations: reward, accuracy and time left.

    Use as a context manager; `show` after each iteration, `say` for a line that stays.
    """

    def __init__(self, iterations: int, *, enabled: bool = True) -> None:
        self._console = Console(quiet=not enabled, highlight=False, markup=False)
        self._live = self._console.is_terminal
        self._iterations = iterations
        self._progress = Progress(
            TextColumn("iteration {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            disable=not (enabled and self._live),
        )
        self._task = self._progress.add_task("", total=iterations, figures="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, soft_wrap=True)

    def warn(self, warnings: list[str]) -> None:
        """Say what is in a list, and empty it."""
        while warnings:
            self.say(f"warning: {warnings.pop(0)}")

    def show(self, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Show where an iteration's record has brought the run."""
        figures = f"reward {metrics['reward']:.3f}"
        if "accuracy" in metrics:
            figures += f"  accuracy {metrics['accuracy']:.0%}"
        done = int(metrics["iteration"]) + 1
        self._progress.update(self._task, completed=done, figures=figures)
        if not self._live and (done % 10 == 0 or done in (1, self._iterations)):
            minutes, seconds = divmod(round(seconds_left), 60)
            self.say(
                f"iteration {done}/{self._iterations}  {figures}  left {minutes}:{seconds:02d}"
            )

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values."""
        table = Table(title=title, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")  # a path cut short would be of no use
        for name, value in rows:
            table.add_row(name, value)
        self._console.print(table)


@dataclass
class Stop:
    """Whether the run was asked to end."""

    requested: bool = False


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """The first Ctrl-C asks the loop to end after its iteration; the second one interrupts it."""
    stop = Stop()

    def handle(signal_number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print("\nstopping after this iteration; press Ctrl-C again to stop at once", flush=True)

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: leave signals to whoever owns them
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
