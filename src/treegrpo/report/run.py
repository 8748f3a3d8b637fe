"""What a run says at its end: pictures, the summary and its tables.

Left out: the records of its iterations (`tracking.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from treegrpo.config import Config
from treegrpo.console import Display
from treegrpo.evaluation.results import Evaluation, Figures, compare
from treegrpo.readable import counted, duration, number, with_error
from treegrpo.report.curve import training_curve
from treegrpo.report.pictures import Headline, before_after
from treegrpo.run_folder import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    PICTURE_FILES,
    SUMMARY_FILE,
    read_lines,
    write_atomically,
)


@dataclass(frozen=True)
class TrainingResult:
    """What a run achieved on held-out prompts, and what it cost.

    Attributes:
        before, after: reward means.
        figures: by reward, the trained model beside the untrained one, with standard errors.
        held_out: how many prompts that was.
    """

    folder: Path
    before: dict[str, float]
    after: dict[str, float]
    figures: dict[str, Figures]
    held_out: int
    iterations: int
    seconds: float
    rollout_forwards: int
    update_forwards: int
    interrupted: bool

    @staticmethod
    def of(
        folder: Path,
        before: Evaluation,
        after: Evaluation,
        progress: Mapping[str, Any],
        *,
        interrupted: bool,
    ) -> TrainingResult:
        """From the first and the last evaluation and what a run has done."""
        first, last = ({name: one.mean(name) for name in one.scores} for one in (before, after))
        done = {**progress, "iterations": progress["iteration"], "interrupted": interrupted}
        del done["iteration"]
        figures = _figures(before, after)
        return TrainingResult(folder, first, last, figures, len(before.prompts), **done)


def _figures(before: Evaluation, after: Evaluation) -> dict[str, Figures]:
    return {name: compare(after.scores[name], scores) for name, scores in before.scores.items()}


def describe(before: Evaluation, now: Evaluation) -> list[str]:
    """A line per reward: its mean, and where the two differ, how far it has come."""
    lines = []
    for name, found in _figures(before, now).items():
        change = with_error(found.difference or 0.0, found.difference_standard_error, "+")
        mean = with_error(found.mean, found.standard_error)
        lines.append(f"{name} {mean}" + ("" if now is before else f" ({change})"))
    return lines


def write_report(
    config: Config, before: Evaluation, after: Evaluation, result: TrainingResult
) -> None:
    """Pictures and summary.json."""
    folder, accuracy, main = result.folder, config.accuracy, config.trained_rewards[0].key
    summary = asdict(result) | {"folder": str(folder)}
    write_atomically(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    picture, curve = (folder / name for name in PICTURE_FILES)
    correct: list[Tensor | None] = [None, None]
    if accuracy is not None:
        correct = [one.scores[accuracy][list(one.kept)] > 0.5 for one in (before, after)]
    before_after(
        picture,
        [before.prompts[index] for index in before.kept],
        before.images,
        after.images,
        *correct,
        label_after=f"after {duration(result.seconds)}",
        headline=_headline(config, result),
    )
    evaluations = read_lines(folder / EVALUATIONS_FILE)
    for record in evaluations:
        for key, name in {"reward": main, "accuracy": accuracy}.items():
            if name is not None:
                record[key] = record[name]
                record[f"{key}_standard_error"] = record[f"{name}_standard_error"]
    training_curve(
        curve,
        read_lines(folder / METRICS_FILE),
        evaluations,
        {r.key: r.weight > 0 for r in config.rewards if r.key != accuracy},
        averaged=config.train.ema_decay is not None,
    )


def _headline(config: Config, result: TrainingResult) -> Headline:
    where = counted(result.held_out, "held-out prompt")
    if config.accuracy is not None:
        shares = (of[config.accuracy] for of in (result.before, result.after))
        return Headline(where, *(f"{share:.0%} right" for share in shares))
    main = config.trained_rewards[0].key
    found = result.figures[main]
    digits = min(filter(None, (found.base_standard_error, found.standard_error)), default=None)
    means = (number(mean, digits) for mean in (found.base_mean or 0.0, found.mean))
    return Headline(f"mean {main} of {where}", *means)


def show_result(result: TrainingResult, display: Display) -> None:
    """The closing tables."""
    folder, (picture, curve) = result.folder, PICTURE_FILES
    display.table(
        "interrupted; what was trained is saved" if result.interrupted else "done",
        [counted(result.held_out, "held-out prompt"), "before", "after", "change"],
        [
            [
                name,
                with_error(found.base_mean or 0.0, found.base_standard_error),
                with_error(found.mean, found.standard_error),
                with_error(found.difference or 0.0, found.difference_standard_error, "+"),
            ]
            for name, found in result.figures.items()
        ],
    )
    forwards = f"{result.rollout_forwards:,} rollout, {result.update_forwards:,} update"
    pace = result.seconds / max(result.iterations, 1)
    display.table(
        "",
        [],
        [
            ["iterations", f"{result.iterations}, {duration(pace)} each"],
            ["training time", duration(result.seconds)],
            ["model forwards", forwards],
            ["before and after", str(folder / picture)],
            ["reward curve", str(folder / curve)],
            ["metrics", str(folder / METRICS_FILE)],
            ["trained model", str(folder / MODEL_FOLDER)],
        ],
    )
    if result.interrupted:
        display.say("continue with the same command and --resume")
