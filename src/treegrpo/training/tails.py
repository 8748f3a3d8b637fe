"""How well a shortened tail ranks the leaves: asked on one prompt now and then.

Left out: the tail itself (`RolloutPlan.with_tail`, `transition.multistep`).
"""

from __future__ import annotations

import statistics
from collections import deque

import torch

from treegrpo.advantage import without_signal
from treegrpo.methods import Credit, Method
from treegrpo.training.collector import Batch, Collector
from treegrpo.training.engine import Engine
from treegrpo.training.metrics import Stopwatch

# Below this, tail_steps is too few. A single prompt's correlation says little, three's mean enough.
ENOUGH_AGREEMENT = 0.9
_MEASUREMENTS = 3


class TailCheck:
    """Compares leaf advantages with those that whole tails would have given.

    Args:
        warnings: takes what is to be told.
    """

    def __init__(
        self, collector: Collector, method: Method, engine: Engine, warnings: list[str]
    ) -> None:
        self._collector, self._method, self._engine = collector, method, engine
        self._warnings = warnings
        self._latest: deque[float] = deque(maxlen=_MEASUREMENTS)
        self._has_warned = False

    def __call__(
        self, batch: Batch, credit: Credit, iteration: int, watch: Stopwatch
    ) -> dict[str, float]:
        """`tail_agreement`, where it is due: Pearson's correlation over one prompt's leaves.

        The prompt is each process's first with a signal; processes' correlations are averaged.

        Raises:
            RewardError: a reward failed, here or on another process.
        """
        every = self._method.tail_check_every
        if not every or iteration % every or not batch.forest.plan.skips:
            return {}
        with watch("tail_check"), self._engine.failing_together():
            own = self._agreement(batch, credit)
        everyones = [value for value in self._engine.everyones(own) if value is not None]
        if not everyones:
            return {}
        self._latest.append(statistics.fmean(everyones))
        agreement = statistics.fmean(self._latest)
        if len(self._latest) == _MEASUREMENTS and agreement < ENOUGH_AGREEMENT:
            self._warn(agreement)
        return {"tail_agreement": self._latest[-1]}

    def _agreement(self, batch: Batch, credit: Credit) -> float | None:
        candidates = (~without_signal(credit.leaves)).nonzero()
        if not len(candidates):
            return None
        number = int(candidates[0])
        whole = self._method.leaf_advantages(self._collector.with_whole_tail(batch, number))
        both = torch.stack([credit.leaves[number].double(), whole[0].double()])
        # Where whole tails show no signal, there is nothing to agree with.
        return float(torch.corrcoef(both)[0, 1].nan_to_num(0.0))

    def _warn(self, agreement: float) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        self._warnings.append(
            f"tail_agreement is {agreement:.2f} over the last {_MEASUREMENTS} checks, below "
            f"{ENOUGH_AGREEMENT}: tails of rollout.tail_steps rank the samples otherwise than "
            "whole ones; raise rollout.tail_steps, or set it to null"
        )
