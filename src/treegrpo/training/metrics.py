"""From what an iteration computed to its record: sums, extremes and means over all processes.

Left out: where records go (`tracking.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treegrpo.advantage import without_signal
from treegrpo.config import Config
from treegrpo.console import Phase, silent
from treegrpo.evaluation.results import Evaluation
from treegrpo.objective import Loss
from treegrpo.readable import number

# Iterations in a row without any signal, after which a reward is spoken of.
SILENT_ITERATIONS = 3


@dataclass
class UpdateMetrics:
    """The figures of losses, added up.

    Attributes:
        loss: the sum of the losses' values.
        forwards: rows that went through the model with gradient.
    """

    loss: float = 0.0
    forwards: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _least: dict[str, float] = field(default_factory=dict)
    _most: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        """Count one micro-batch."""
        dtype = loss.value.dtype
        scalars = [
            loss.value.detach(),
            *(values.to(dtype).sum() for values in loss.means.values()),
            *(values.to(dtype).min() for values in loss.least.values()),
            *(values.to(dtype).max() for values in loss.most.values()),
        ]
        # One transfer from the device for all numbers.
        numbers = iter(torch.stack(scalars).tolist())
        self._add(
            next(numbers),
            loss.forwards,
            {name: (next(numbers), values.numel()) for name, values in loss.means.items()},
            {name: next(numbers) for name in loss.least},
            {name: next(numbers) for name in loss.most},
        )

    def merge(self, other: UpdateMetrics) -> None:
        """Count what another one has counted."""
        sums = {name: (value, other._counts[name]) for name, value in other._sums.items()}
        self._add(other.loss, other.forwards, sums, other._least, other._most)

    def _add(
        self,
        loss: float,
        forwards: int,
        sums: Mapping[str, tuple[float, int]],
        least: Mapping[str, float],
        most: Mapping[str, float],
    ) -> None:
        self.loss += loss
        self.forwards += forwards
        for name, (value, count) in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + count
        for name, value in least.items():
            self._least[name] = _extreme(min, self._least.get(name, value), value)
        for name, value in most.items():
            self._most[name] = _extreme(max, self._most.get(name, value), value)

    def record(self) -> dict[str, float]:
        """The loss and each figure: its mean, its least or its most."""
        means = {name: value / max(self._counts[name], 1) for name, value in self._sums.items()}
        return {"loss": self.loss, **means, **self._least, **self._most}


def _extreme(choose: Callable[[float, float], float], first: float, second: float) -> float:
    """`min` or `max`, and NaN where one is, which they let pass or not by its place."""
    return math.nan if math.isnan(first) or math.isnan(second) else choose(first, second)


class RewardMetrics:
    """Figures of rewards, and of how they have moved since before training.

    Args:
        config: its rewards, the first trained one of which is "reward", and its accuracy.
        before: of the untrained model, once it has been measured.
    """

    def __init__(self, config: Config, before: Evaluation | None = None) -> None:
        self._main, self._accuracy = config.trained_rewards[0].key, config.accuracy
        self._before = {} if before is None else before.scores

    def record(self, rewards: Mapping[str, Tensor]) -> dict[str, float]:
        """The figures of an iteration.

        Args:
            rewards: name to [prompts, leaves], of all processes.
        """
        record: dict[str, float] = {}
        for name, values in rewards.items():
            figures = {
                "reward": values.mean().item(),
                "reward_std": values.std(correction=0).item(),
                "reward_std_within_group": values.std(1, correction=0).mean().item(),
                "groups_without_signal": without_signal(values).sum().item(),
            }
            if name == self._main:
                record |= figures
            record |= {f"{key}/{name}": value for key, value in figures.items()}
            if name in self._before:
                scores = self._before[name]
                gain = figures["reward"] - scores.mean().item()
                std = scores.std(correction=0).item()
                record[f"reward_normalized/{name}"] = gain / (std or 1.0)
        if self._accuracy is not None:
            record["accuracy"] = rewards[self._accuracy].mean().item()
        return record


class SilentRewards:
    """Notices trained rewards that tell no pictures of a prompt apart, iteration after iteration.

    Args:
        names: theirs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._iterations = dict.fromkeys(names, 0)

    def warnings(self, rewards: Mapping[str, Tensor]) -> list[str]:
        """What is to be told after an iteration, of whose rewards `RewardMetrics.record` says."""
        found = []
        for name, before in self._iterations.items():
            values = rewards[name]
            silent = bool(without_signal(values).all())
            self._iterations[name] = count = before + 1 if silent else 0
            if count == SILENT_ITERATIONS:
                least, most = number(values.min().item()), number(values.max().item())
                given = least if least == most else f"between {least} and {most}"
                found.append(
                    f"for {count} iterations, the reward {name!r} has given all pictures of a "
                    f"prompt the same ({given}): nothing can be learned from it. Look at what it "
                    "answers for the model's pictures (`treegrpo sample`); if it is right, take a "
                    "finer reward, other prompts, or more different samples "
                    "(rollout.noise_level, larger groups)"
                )
        return found


class Stopwatch:
    """Seconds per named stage; waits for the device, so that a stage gets its own time.

    Args:
        phase: is told each stage.

    Attributes:
        seconds: by stage.
    """

    def __init__(self, device: torch.device, phase: Phase = silent) -> None:
        self._device, self._phase = device, phase
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens inside for a stage."""
        self._phase(name)
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def record(self) -> dict[str, float]:
        """The total and each stage's seconds."""
        stages = {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
        return {"seconds": self.total, **stages}


def is_due(every: int, iteration: int) -> bool:
    """Whether something is, after so many iterations; 0 is never."""
    return every > 0 and iteration % every == 0
