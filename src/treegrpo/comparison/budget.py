"""What an iteration costs, and how many a budget allows: exact, before anything runs.

A method's plan depends on the iteration and the seed alone, so the cost of a whole run is known.

Left out: wall time, which is measured (`running.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

from treegrpo.config import Config, method_of
from treegrpo.errors import UserError

Unit = Literal["forwards", "minutes", "iterations"]

# Sums of the same costs in another order differ by rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Budget:
    """What every run may spend."""

    amount: float
    unit: Unit = "forwards"

    @staticmethod
    def of(text: str) -> Budget:
        """From such as "300000", "3e5forwards", "20minutes" or "80iterations".

        Raises:
            UserError: it is none.
        """
        match = re.fullmatch(r"([\d_.,]+(?:e\d+)?) *(forwards|minutes|iterations)?", text.strip())
        try:
            amount = float(match[1].replace(",", "")) if match else 0.0
        except ValueError:
            amount = 0.0
        unit: Unit = match[2] if match and match[2] else "forwards"  # type: ignore[assignment]
        if amount <= 0 or (unit == "iterations" and amount != int(amount)):
            raise UserError(
                f"--budget: got {text!r}; must be a number of forwards such as 300000, or such as "
                "20minutes or 80iterations"
            )
        return Budget(amount, unit)

    def __str__(self) -> str:
        return f"{self.amount:,.10g} {self.unit}"


@dataclass(frozen=True)
class Cost:
    """Rows through the model in one iteration; guidance doubles all alike and is not counted.

    Attributes:
        rollout: to sample.
        update: with gradient, over all passes.
        reference: through the initial model, where the objective needs it.
        factor: what a row with gradient, forward and backward, counts beside one without.
    """

    rollout: int
    update: int
    reference: int
    factor: float

    @property
    def total(self) -> float:
        """In forwards."""
        return self.rollout + self.factor * self.update + self.reference


def costs(config: Config, factor: float) -> Iterator[Cost]:
    """Of iteration 0, 1, ... without end."""
    method, prompts = method_of(config), config.rollout.prompts_per_iteration
    for iteration in count():
        plan = method.plan(iteration)
        nodes = prompts * method.update_forwards(plan)
        yield Cost(
            prompts * plan.rollout_forwards,
            nodes * config.train.inner_epochs,
            nodes * method.needs_reference,
            factor,
        )


def cost_of(config: Config, factor: float) -> float:
    """What `train.iterations` of a configuration cost, in forwards."""
    return sum(cost.total for cost in islice(costs(config, factor), config.train.iterations))


def affordable(config: Config, forwards: float, factor: float) -> int:
    """The most iterations whose cost is at most so many forwards."""
    spent, limit = 0.0, forwards * (1 + _ROUNDING)
    for iteration, cost in enumerate(costs(config, factor)):
        spent += cost.total
        if spent > limit:
            return iteration
    raise AssertionError("costs have no end")
