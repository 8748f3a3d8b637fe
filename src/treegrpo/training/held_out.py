"""Evaluations of a run on its held-out prompts: before training, on the way and at its end.

Left out: sampling and scoring them (`evaluation/measure.py`).
"""

from __future__ import annotations

from treegrpo.console import Display
from treegrpo.readable import counted
from treegrpo.report.run import describe
from treegrpo.tracking import Tracker
from treegrpo.training.build import Run
from treegrpo.training.metrics import RewardMetrics, is_due


class HeldOut:
    """A run's evaluations, kept and told as they are made.

    Making one measures the untrained model; a run that is resumed then takes over its weights.

    Attributes:
        before: of the untrained model.
        last: the latest.
        iteration: after how many iterations that was.
    """

    def __init__(self, run: Run, tracker: Tracker, display: Display, *, resume: bool) -> None:
        self._run, self._tracker, self._display = run, tracker, display
        self.before = self.last = run.measure()
        self.iteration = 0
        run.reward_metrics = RewardMetrics(run.config, self.before)
        display.say(
            f"{counted(len(self.before.prompts), 'held-out prompt')}: ± standard error, "
            "(change since before training)"
        )
        self._tell()
        if not resume:
            tracker.evaluation(0, self.before)
            return
        run.restore()
        done = run.progress.iteration
        missing = done > 0 and not tracker.has_evaluation(done)
        # The run may have ended before this was done; one process knows.
        if any(run.engine.anywhere(missing and is_due(run.config.evaluation.every, done))):
            self.measure()

    def measure(self) -> None:
        """Evaluate the model as it is now, if that has not been done."""
        if self.iteration != self._run.progress.iteration:
            self.last, self.iteration = self._run.measure(), self._run.progress.iteration
            self._tracker.evaluation(self.iteration, self.last)
            self._tell()

    def _tell(self) -> None:
        place = f"evaluation {self.iteration}/{self._run.config.train.iterations}"
        for line in describe(self.before, self.last):
            self._display.note(f"{place}  {line}")
