"""What one run of a comparison came to: figures and curve, as they are kept beside the run.

Left out: figures over several runs (`summary.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path

from treegrpo.comparison.budget import costs
from treegrpo.config import Config, method_of
from treegrpo.evaluation.results import Evaluation
from treegrpo.run_folder import EVALUATIONS_FILE, METRICS_FILE, read_lines, write_atomically
from treegrpo.training.metrics import is_due

OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class Point:
    """A run on held-out prompts after so much work.

    Attributes:
        cost: in forwards, a row with gradient counted as told.
        images: drawn for training.
        seconds: of training.
        reward: of the trained one; of several, see `combined`.
        rewards: the mean of each.
    """

    iteration: int
    cost: float
    images: int
    seconds: float
    reward: float
    accuracy: float | None
    rewards: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    Attributes:
        entry: its label.
        changes: the values that are tried, or that were chosen.
        error: what it failed with, such as a divergence; it then has no curve.
        cost: in forwards.
        seconds: of training; `seconds_rollout` and `seconds_update` are parts of it.
        wall_seconds: with evaluations and files, of this process's part.
    """

    entry: str
    seed: int
    changes: tuple[str, ...]
    error: str | None = None
    iterations: int = 0
    cost: float = 0.0
    rollout_forwards: int = 0
    update_forwards: int = 0
    reference_forwards: int = 0
    images: int = 0
    seconds: float = 0.0
    seconds_rollout: float = 0.0
    seconds_update: float = 0.0
    wall_seconds: float = 0.0
    curve: tuple[Point, ...] = field(default=())

    @property
    def end(self) -> Point:
        """The last point."""
        return self.curve[-1]

    def write(self, folder: Path) -> None:
        """Keep it in the run's folder: whole, or not at all."""
        folder.mkdir(parents=True, exist_ok=True)  # a run may fail before it has made one
        write_atomically(folder / OUTCOME_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Outcome | None:
        """What `write` kept, if the run has ended."""
        file = folder / OUTCOME_FILE
        if not file.is_file():
            return None
        values = json.loads(file.read_text(encoding="utf-8"))
        curve = tuple(Point(**point) for point in values.pop("curve"))
        return Outcome(**{**values, "changes": tuple(values["changes"])}, curve=curve)


def measured(
    label: str,
    config: Config,
    changes: Sequence[str],
    factor: float,
    before: Evaluation,
    wall_seconds: float,
) -> Outcome:
    """From the records of a run that has ended.

    Points of a run that was interrupted, made where it stopped, are left out: it has those of an
    unbroken one.
    """
    metrics = read_lines(config.output / METRICS_FILE)
    done = len(metrics)
    spent = list(islice(costs(config, factor), done))
    total = list(accumulate((cost.total for cost in spent), initial=0.0))
    seconds = list(accumulate((record["seconds"] for record in metrics), initial=0.0))
    leaves = _leaves(config, done)
    curve = []
    for record in read_lines(config.output / EVALUATIONS_FILE):
        iteration = int(record["iteration"])
        if is_due(config.evaluation.every, iteration) or iteration == done:
            means = {name: record[name] for name in before.scores}
            curve.append(
                Point(
                    iteration,
                    total[iteration],
                    leaves[iteration],
                    seconds[iteration],
                    combined(config, means, before),
                    None if config.accuracy is None else means[config.accuracy],
                    means,
                )
            )
    return Outcome(
        label,
        config.train.seed,
        tuple(changes),
        None,
        done,
        total[-1],
        int(sum(record["rollout_forwards"] for record in metrics)),
        int(sum(record["update_forwards"] for record in metrics)),
        sum(cost.reference for cost in spent),
        leaves[-1],
        seconds[-1],
        sum(record["seconds_rollout"] for record in metrics),
        sum(record["seconds_update"] for record in metrics),
        wall_seconds,
        tuple(curve),
    )


def combined(config: Config, means: Mapping[str, float], before: Evaluation) -> float:
    """The trained reward; of several the weighted mean of their normalised gains.

    A gain is over the untrained model and in standard deviations of its scores, since rewards have
    scales of their own.
    """
    trained = config.trained_rewards
    if len(trained) == 1:
        return means[trained[0].key]
    gain = 0.0
    for reward in trained:
        scores = before.scores[reward.key]
        spread = scores.std(correction=0).item() or 1.0
        gain += reward.weight * (means[reward.key] - scores.mean().item()) / spread
    return gain / sum(reward.weight for reward in trained)


def _leaves(config: Config, iterations: int) -> list[int]:
    """Images drawn for training after 0, 1, ... iterations."""
    method = method_of(config)
    each = (
        config.rollout.prompts_per_iteration * method.plan(iteration).leaves
        for iteration in range(iterations)
    )
    return list(accumulate(each, initial=0))
