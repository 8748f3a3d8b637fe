"""The runs of a comparison: first those that values are chosen on, then the reported ones, in turn.

What has ended is never run again, and what was interrupted goes on where it stopped.

Left out: what a run came to (`outcome.py`), and the training (`training/loop.py`).
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from treegrpo.comparison.entries import Entry
from treegrpo.comparison.outcome import Outcome, measured
from treegrpo.comparison.study import POINTS, RUNS_FOLDER, Study
from treegrpo.config import Config
from treegrpo.errors import UserError
from treegrpo.evaluation.results import Evaluation
from treegrpo.finite import NotFiniteError
from treegrpo.images import evenly_spaced
from treegrpo.report.comparison import thumbnail
from treegrpo.run_folder import (
    EARLIER_STATE_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    STATE_FILE,
    read_lines,
    write_atomically,
)
from treegrpo.training.loop import train

PICTURES_FILE = "pictures.json"
_PICTURED_IMAGES = 2  # of a prompt
_PILOT_ITERATIONS = 3  # from which the number is found that a budget of minutes allows
_TRIAL = "tuning-"


class Interrupted(Exception):
    """A run was asked to stop; the same comparison continues it."""


@dataclass(frozen=True)
class Choice:
    """Values that an entry was tuned to.

    Attributes:
        entry: its label.
        changes: the best; None: all failed.
        at_an_end: keys whose best value is the least or the largest that was tried.
    """

    entry: str
    changes: tuple[str, ...] | None
    at_an_end: tuple[str, ...] = ()


@dataclass
class Results:
    """What has been found so far.

    Attributes:
        tried: runs on the tuning seed.
        choices: by entry, where it is tuned.
        outcomes: of the reported seeds.
    """

    tried: list[Outcome] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)


def run_study(
    study: Study, say: Callable[[str], None], changed: Callable[[Results], None]
) -> Results:
    """Run what has not been run.

    Args:
        say: is told what begins and what has ended.
        changed: is given the results whenever they grow.

    Raises:
        Interrupted: a run was asked to stop.
        RewardError: a reward failed, which is no run's fault: the same comparison continues.
        UserError: the files of a run cannot be used.
    """
    results = Results()
    changed(results)
    trials = _trials(study)
    progress = _Progress(len(trials) + len(study.seeds) * len(study.entries), say)
    for trial in trials:
        results.tried.append(progress.over(trial))
        changed(results)
    for entry in study.entries:
        if study.grids(entry):
            results.choices[entry.label] = choose(study, entry, results.tried)
    for number, seed in enumerate(study.seeds):
        for entry in study.in_turn(number):
            choice = results.choices.get(entry.label, Choice(entry.label, ()))
            if choice.changes is None:
                error = "not run: every value that was tried to tune it has failed"
                outcome = Outcome(entry.label, seed, (), error)
            else:
                folder = study.folder / RUNS_FOLDER / entry.folder / f"seed-{seed}"
                run = _Run(study, entry, choice.changes, seed, folder, pictures=number == 0)
                outcome = progress.over(run)
            results.outcomes.append(outcome)
            changed(results)
    return results


def _trials(study: Study) -> list[_Run]:
    """The runs on the tuning seed: every entry's first value, then their second, ..."""
    tuned = {entry: study.candidates(entry) for entry in study.entries if study.grids(entry)}
    trials = []
    for number in range(max(map(len, tuned.values()), default=0)):
        for entry in study.in_turn(number):
            if number < len(tuned.get(entry, ())):
                folder = study.folder / RUNS_FOLDER / entry.folder / f"{_TRIAL}{number}"
                changes = tuned[entry][number]
                trials.append(_Run(study, entry, changes, study.tuning_seed, folder))
    return trials


def choose(study: Study, entry: Entry, tried: Sequence[Outcome]) -> Choice:
    """The entry's best by accuracy, else by the trained reward; the first of equals."""

    def worth(outcome: Outcome) -> tuple[float, float]:
        accuracy = outcome.end.accuracy
        return (0.0 if accuracy is None else accuracy, outcome.end.reward)

    sound = [one for one in tried if one.entry == entry.label and one.error is None]
    if not sound:
        return Choice(entry.label, None)
    best = max(sound, key=worth)
    ends = (grid.key for grid in study.grids(entry) if grid.at_an_end(best.changes))
    return Choice(entry.label, best.changes, tuple(ends))


@dataclass(frozen=True)
class _Run:
    """One run, reported or to tune.

    Attributes:
        pictures: whether its last pictures, and those before training, are kept.
    """

    study: Study
    entry: Entry
    changes: tuple[str, ...]
    seed: int
    folder: Path
    pictures: bool = False

    @property
    def name(self) -> str:
        """For people."""
        values = "".join(f" {change.rpartition('.')[2]}" for change in self.changes)
        return f"{self.entry.label}{values}, seed {self.seed}"

    def outcome(self) -> Outcome:
        """Run it, or go on with it, unless it has ended."""
        ended = Outcome.read(self.folder)
        if ended is not None:
            return ended
        iterations = self.study.iterations(self._config())
        if iterations is None:
            iterations = self._in_time()
        every = max(1, round(iterations / POINTS))
        config = self._config(
            f"train.iterations={iterations}",
            f"evaluation.every={every}",
            f"train.save_every={every}",
            f"train.time_limit_minutes={self._minutes()}",
            f"output={self.folder}",
        )
        outcome = _trained(self, config)
        outcome.write(self.folder)
        for name in (STATE_FILE, EARLIER_STATE_FILE):  # it will not be continued
            (self.folder / name).unlink(missing_ok=True)
        if self.folder.name.startswith(_TRIAL):
            shutil.rmtree(self.folder / MODEL_FOLDER, ignore_errors=True)
        return outcome

    def _config(self, *more: str) -> Config:
        return self.study.config(self.entry, [*self.changes, *more], self.seed)

    def _minutes(self) -> str:
        return f"{self.study.budget.amount:g}" if self.study.budget.unit == "minutes" else "null"

    def _in_time(self) -> int:
        """Iterations that the budget's minutes allow, by the pace of a few.

        The pilot is kept, so that a continued run has the same number.
        """
        folder = self.folder.with_name(f"pilot-of-{self.folder.name}")
        pilot = Outcome.read(folder)
        if pilot is None:
            config = self._config(
                f"train.iterations={_PILOT_ITERATIONS}",
                "train.time_limit_minutes=null",
                "evaluation.every=0",
                "evaluation.max_prompts=1",
                "evaluation.images_per_prompt=1",
                f"output={folder}",
            )
            pilot = _trained(self, config)
            pilot.write(folder)
            for name in (STATE_FILE, EARLIER_STATE_FILE):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)
        if pilot.error is not None:
            return 1  # the run will fail alike, and say so
        pace = median(record["seconds"] for record in read_lines(folder / METRICS_FILE))
        return max(1, int(60 * self.study.budget.amount / pace))


def _trained(run: _Run, config: Config) -> Outcome:
    """Train, or continue; a model that breaks is an outcome too.

    Raises:
        Interrupted: it was asked to stop.
    """
    start = time.perf_counter()
    kept: list[Evaluation] = []
    resume = (config.output / STATE_FILE).is_file()
    if not resume:
        shutil.rmtree(config.output, ignore_errors=True)  # begun, and lost before its first state

    def finished(before: Evaluation, last: Evaluation) -> None:
        kept.extend((before, last))

    try:
        result = train(config, resume=resume, finished=finished)
    except UserError as error:
        # Those of other kinds are about the files, which a later call may find in order.
        if type(error) not in (UserError, NotFiniteError):
            raise
        return Outcome(run.entry.label, run.seed, run.changes, str(error))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if result.interrupted and result.iterations < config.train.iterations:
        raise Interrupted
    before, last = kept
    if run.pictures:
        _keep_pictures(config, before, last)
    seconds = time.perf_counter() - start
    return measured(run.entry.label, config, run.changes, run.study.factor, before, seconds)


def _keep_pictures(config: Config, before: Evaluation, last: Evaluation) -> None:
    """Write some of the last evaluation's, and the untrained model's of the same noises."""

    def described(evaluation: Evaluation) -> list[list[dict[str, str | bool | None]]]:
        rows = []
        for place, images in zip(evaluation.kept, evaluation.images, strict=True):
            row = []
            for number in evenly_spaced(len(images), _PICTURED_IMAGES):
                right = None
                if config.accuracy is not None:
                    right = bool(evaluation.scores[config.accuracy][place, number] > 0.5)
                row.append({"image": thumbnail(images[number]), "right": right})
            rows.append(row)
        return rows

    pictures = {
        "prompts": [last.prompts[place] for place in last.kept],
        "before": described(before),
        "after": described(last),
    }
    write_atomically(config.output / PICTURES_FILE, json.dumps(pictures))


@dataclass
class _Progress:
    """Which run is running, and about how long the rest will take."""

    total: int
    say: Callable[[str], None]
    done: int = 0
    seconds: list[float] = field(default_factory=list)

    def over(self, run: _Run) -> Outcome:
        """Run it, with a line before and a line after."""
        self.done += 1
        place = f"run {self.done} of {self.total}: {run.name}"
        was_there = Outcome.read(run.folder) is not None
        if not was_there:
            self.say(place)
        outcome = run.outcome()
        if was_there:
            self.say(f"{place}: there already")
            return outcome
        self.seconds.append(outcome.wall_seconds)
        left = (self.total - self.done) * sum(self.seconds) / len(self.seconds)
        self.say(f"{run.name}: {in_words(outcome)}; about {left / 60:.0f} min left")
        return outcome


def in_words(outcome: Outcome) -> str:
    """How a run ended."""
    if outcome.error is not None:
        return f"failed: {outcome.error}"
    start, end = outcome.curve[0], outcome.end
    words = [f"{outcome.iterations} iterations", f"reward {start.reward:.3f} -> {end.reward:.3f}"]
    if start.accuracy is not None and end.accuracy is not None:
        words.append(f"accuracy {start.accuracy:.1%} -> {end.accuracy:.1%}")
    return ", ".join(words)
