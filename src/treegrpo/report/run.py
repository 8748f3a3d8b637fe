"""What a run says at its end: pictures, the summary and its table.

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
from treegrpo.evaluation.results import Evaluation
from treegrpo.report.pictures import before_after, training_curve
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
    """What a run achieved: reward means on held-out prompts, and what it cost."""

    folder: Path
    before: dict[str, float]
    after: dict[str, float]
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
        return TrainingResult(folder, first, last, **done)


def describe(evaluation: Evaluation) -> str:
    """The means on one line."""
    return "  ".join(f"{name} {evaluation.mean(name):.3f}" for name in evaluation.scores)


def write_report(
    config: Config,
    before: Evaluation,
    after: Evaluation,
    result: TrainingResult,
    display: Display | None,
) -> None:
    """Pictures, summary.json and, where there is a display, the closing table."""
    folder, accuracy, seconds = result.folder, config.accuracy, result.seconds
    summary = asdict(result) | {"folder": str(folder)}
    write_atomically(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    picture, curve = (folder / name for name in PICTURE_FILES)
    correct: list[Tensor | None] = [None, None]
    if accuracy is not None:
        correct = [one.scores[accuracy][list(one.kept)] > 0.5 for one in (before, after)]
    duration = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    before_after(
        picture,
        [before.prompts[index] for index in before.kept],
        before.images,
        after.images,
        *correct,
        label_after=f"after {duration} of training",
        accuracy_before=result.before[accuracy] if accuracy else None,
        accuracy_after=result.after[accuracy] if accuracy else None,
    )
    evaluations = read_lines(folder / EVALUATIONS_FILE)
    main = config.trained_rewards[0].key
    for record in evaluations:
        record["reward"] = record[main]
        if accuracy is not None:
            record["accuracy"] = record[accuracy]
    metrics = read_lines(folder / METRICS_FILE)
    rewards = {r.key: r.weight > 0 for r in config.rewards if r.key != accuracy}
    training_curve(curve, metrics, evaluations, rewards)
    if display is None:
        return
    where = f"on {len(before.prompts)} held-out prompts"
    forwards = f"{result.rollout_forwards:,} rollout, {result.update_forwards:,} update"
    rows = [
        (f"{name} {where}", f"{mean:.3f} -> {result.after[name]:.3f}")
        for name, mean in result.before.items()
    ]
    rows += [
        ("iterations", f"{result.iterations}"),
        ("training time", f"{int(seconds // 60)} min {seconds % 60:02.0f} s"),
        ("model forwards", forwards),
        ("before and after", str(picture)),
        ("reward curve", str(curve)),
        ("metrics", str(folder / METRICS_FILE)),
        ("trained model", str(folder / MODEL_FOLDER)),
    ]
    display.table("interrupted; what was trained is saved" if result.interrupted else "done", rows)
    if result.interrupted:
        display.say("continue with the same command and --resume")
