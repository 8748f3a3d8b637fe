"""The window of stochastic steps and how it moves: settings and plans that methods share.

Left out: where the window stands in an iteration, which `plan.WindowSchedule` decides.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from treegrpo.methods.method import Method, PlanShare
from treegrpo.methods.settings import AdvantageSettings, RolloutSettings
from treegrpo.plan import RolloutPlan, WindowSchedule
from treegrpo.settings import FREE_ON_RESUME, AtLeastOne, AtLeastZero, problem


class WindowSettings(RolloutSettings):
    """How methods that train a window of steps grow samples."""

    window_size: AtLeastOne = 3
    """Consecutive stochastic, trained steps."""
    window_schedule: Literal["random", "shifting", "fixed"] = "random"
    """How the window's first step is chosen each iteration."""
    window_start: AtLeastZero[int] = 0
    """The window's first step under the fixed schedule."""
    window_decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Random schedule: each later start is this many times as likely; 1 is uniform."""
    shift_by: AtLeastOne = 1
    """Shifting schedule: steps by which the window advances."""
    shift_every: AtLeastOne = 25
    """Shifting schedule: iterations between two advances."""
    tail_steps: AtLeastOne | None = None
    """Most deterministic steps after the window, of second order where that skips some; null: all
    that are left, of first order."""
    tail_check_every: Annotated[AtLeastZero[int], FREE_ON_RESUME] = 10
    """With tail_steps: iterations between two comparisons of a prompt's leaf advantages with those
    of whole tails; 0: never."""

    @field_validator("window_size")
    @classmethod
    def _window_fits(cls, window_size: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and window_size > steps:
            raise problem(window_size, f"must be at most rollout.steps ({steps})")
        return window_size

    @field_validator("tail_steps")
    @classmethod
    def _tail_is_shorter(cls, tail_steps: int | None, info: ValidationInfo) -> int | None:
        steps, size = info.data.get("steps"), info.data.get("window_size")
        if tail_steps is None or steps is None or size is None:
            return tail_steps
        is_fixed = info.data.get("window_schedule") == "fixed"
        left = steps - size - (info.data.get("window_start", 0) if is_fixed else 0)
        if tail_steps >= max(left, 1):
            raise problem(
                tail_steps,
                f"must be less than the steps after the earliest window ({left}: rollout.steps - "
                "rollout.window_size"
                f"{' - rollout.window_start' if is_fixed else ''}), or null for all of them",
            )
        return tail_steps

    @field_validator("window_start")
    @classmethod
    def _fixed_window_fits(cls, window_start: int, info: ValidationInfo) -> int:
        steps, size = info.data.get("steps"), info.data.get("window_size")
        if info.data.get("window_schedule") != "fixed" or steps is None or size is None:
            return window_start
        if window_start + size > steps:
            raise problem(
                window_start,
                f"must be at most {steps - size}: rollout.steps ({steps}) - "
                f"rollout.window_size ({size})",
            )
        return window_start


class WindowMethod(Method):
    """A method whose plan depends on where the window stands."""

    rollout_settings = WindowSettings
    rollout: WindowSettings

    def __init__(
        self,
        rollout: WindowSettings,
        advantage: AdvantageSettings,
        objective: Any,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(rollout, advantage, objective, seed=seed)
        self.tail_check_every = rollout.tail_check_every

    @abstractmethod
    def plan_at(self, window_start: int) -> RolloutPlan:
        """The plan with the window's first step there."""

    @cached_property
    def window(self) -> WindowSchedule:
        """Where the window stands at each iteration."""
        settings = self.rollout
        is_fixed = settings.window_schedule == "fixed"
        return WindowSchedule(
            settings.window_schedule,
            settings.steps,
            settings.window_size,
            start=settings.window_start if is_fixed else 0,
            decay=settings.window_decay,
            shift_by=settings.shift_by,
            shift_every=settings.shift_every,
            seed=self.seed,
        )

    def plan(self, iteration: int) -> RolloutPlan:
        """The plan with the window where its schedule has it."""
        return self._finished(self.plan_at(self.window.at(iteration)))

    def _finished(self, plan: RolloutPlan) -> RolloutPlan:
        tail_steps = self.rollout.tail_steps
        return plan if tail_steps is None else plan.with_tail(tail_steps)

    def plans(self, iterations: int) -> tuple[PlanShare, ...]:
        """A plan per start of the window.

        Shares are the distribution's under the random schedule, else those of the iterations.
        """
        if self.window.kind == "random":
            shares = dict(enumerate(self.window.probabilities))
        else:
            starts = Counter(self.window.at(iteration) for iteration in range(iterations))
            shares = {start: starts[start] / iterations for start in sorted(starts)}
        return tuple(
            PlanShare(self._finished(self.plan_at(start)), share, f"window at {start}")
            for start, share in shares.items()
        )
