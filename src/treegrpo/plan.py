"""What a rollout looks like: how many children each node gets, and which steps are stochastic.

A group of samples for one prompt is a forest, and a forest is described by a `RolloutPlan`. Every
method of the family is a plan: `tree_grpo`, `flow_grpo` (also DDPO), `dance_grpo`, `mix_grpo` and
`branch_grpo` below return one. Nothing here touches a tensor.

Left out: sampling along a plan (`rollout.py`) and settings (`methods/`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Literal


class PlanError(ValueError):
    """A rollout plan, or a window within it, that cannot be carried out."""


@dataclass(frozen=True)
class RolloutPlan:
    """The shape of one prompt's forest over T denoising steps.

    Branching is uniform within a level, so level t is a tensor of `widths[t]` rows, and the parent
    of row j at level t + 1 is row `j // branching[t]`.

    Attributes:
        roots: independent noises per prompt.
        branching: length T; children of every node at step t.
        stochastic: length T; True for a sampled transition, which has a log-probability and is
            trained; False for a deterministic one, which is neither.
        levels: length T + 1; where in the model's schedule each level of the forest stands. Empty
            (the default) becomes 0..T. Only deterministic steps may skip levels.

    Raises:
        PlanError: lengths differ, a count is below one, a deterministic step branches, or a
            stochastic one skips levels.
    """

    roots: int
    branching: tuple[int, ...]
    stochastic: tuple[bool, ...]
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.levels:
            object.__setattr__(self, "levels", tuple(range(len(self.branching) + 1)))
        if self.roots < 1:
            raise PlanError(f"roots: got {self.roots}; a plan needs at least 1 root per prompt")
        if not self.branching:
            raise PlanError("branching: got no steps; a plan needs at least 1 denoising step")
        if len(self.branching) != len(self.stochastic):
            raise PlanError(
                f"branching has {len(self.branching)} steps but stochastic has "
                f"{len(self.stochastic)}; both must have one entry per denoising step"
            )
        for step, (children, stochastic) in enumerate(
            zip(self.branching, self.stochastic, strict=True)
        ):
            if children < 1:
                raise PlanError(f"branching[{step}]: got {children}; must be at least 1")
            if children > 1 and not stochastic:
                raise PlanError(
                    f"branching[{step}]: got {children} children on a deterministic step; they "
                    "would be identical, so only a stochastic step may branch"
                )
        if len(self.levels) != len(self.branching) + 1:
            raise PlanError(
                f"levels: got {len(self.levels)}; a plan of {len(self.branching)} steps has "
                f"{len(self.branching) + 1}"
            )
        for step, stochastic in enumerate(self.stochastic):
            taken = self.levels[step + 1] - self.levels[step]
            if taken < 1 or (stochastic and taken > 1) or self.levels[0] < 0:
                raise PlanError(
                    f"levels: got {self.levels}; they must rise, and by 1 at a stochastic step"
                )

    @property
    def steps(self) -> int:
        """Denoising steps that are taken: T, or fewer where some are skipped."""
        return len(self.branching)

    @property
    def widths(self) -> tuple[int, ...]:
        """Nodes per prompt at levels 0..T; the last is the number of leaves."""
        return tuple(accumulate(self.branching, mul, initial=self.roots))

    @property
    def leaves(self) -> int:
        """Finished samples per prompt (the group size)."""
        return self.widths[-1]

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """The steps that are sampled, and trained."""
        return tuple(step for step, stochastic in enumerate(self.stochastic) if stochastic)

    @property
    def skips(self) -> bool:
        """Whether it leaves out levels of the schedule."""
        return self.levels[-1] - self.levels[0] > self.steps

    @property
    def edges(self) -> int:
        """Stochastic transitions per prompt, each of which gets an advantage."""
        return sum(self.widths[step + 1] for step in self.stochastic_steps)

    @property
    def rollout_forwards(self) -> int:
        """Model forwards (rows) to sample one prompt's forest: one per node that is not a leaf."""
        return sum(self.widths[:-1])

    @property
    def update_forwards(self) -> int:
        """Forwards with gradient (rows) for one pass over one prompt's forest.

        One per node with stochastic children, because all children of a node are draws from one
        Gaussian, whose mean needs one model call.
        """
        return sum(self.widths[step] for step in self.stochastic_steps)

    def with_tail(self, steps: int) -> RolloutPlan:
        """This plan with at most so many steps after its last stochastic one.

        They stand at levels spread evenly over those that the plan had there, ends included.
        """
        start = max(self.stochastic_steps, default=-1) + 1
        if steps < 1:
            raise PlanError(f"tail_steps: got {steps}; must be at least 1")
        if self.steps - start <= steps:
            return self
        tail = [start + round(step * (self.steps - start) / steps) for step in range(steps + 1)]
        kept = [*range(start), *tail]
        return RolloutPlan(
            self.roots,
            self.branching[:start] + (1,) * steps,
            self.stochastic[:start] + (False,) * steps,
            tuple(self.levels[level] for level in kept),
        )

    def check_leaves(self, max_leaves: int) -> None:
        """Raise `PlanError`, with the arithmetic, if the forest has more than `max_leaves`."""
        if self.leaves > max_leaves:
            factors = [self.roots, *(children for children in self.branching if children > 1)]
            raise PlanError(
                f"the plan has {' x '.join(map(str, factors))} = {self.leaves} leaves per prompt "
                f"(roots x branching at each step), more than max_leaves = {max_leaves}"
            )


def tree_grpo(
    steps: int, *, branching: int = 3, window_size: int = 3, window_start: int = 0, trees: int = 1
) -> RolloutPlan:
    """TreeGRPO: every node inside the window branches; the rest is deterministic and shared."""
    inside = _window(steps, window_size, window_start)
    return RolloutPlan(trees, tuple(branching if here else 1 for here in inside), inside)


def flow_grpo(
    steps: int, *, group_size: int, deterministic_final_step: bool = False
) -> RolloutPlan:
    """Flow-GRPO and DDPO: independent trajectories, every step stochastic and trained."""
    return RolloutPlan(group_size, (1,) * steps, _all(steps, deterministic_final_step))


def dance_grpo(
    steps: int, *, group_size: int, deterministic_final_step: bool = False
) -> RolloutPlan:
    """DanceGRPO: as Flow-GRPO, but the group shares its first noise and parts at step 0."""
    branching = (group_size,) + (1,) * (steps - 1)
    return RolloutPlan(1, branching, _all(steps, deterministic_final_step))


def mix_grpo(
    steps: int, *, group_size: int, window_size: int = 3, window_start: int = 0
) -> RolloutPlan:
    """MixGRPO: independent trajectories, stochastic and trained inside the window only."""
    return RolloutPlan(group_size, (1,) * steps, _window(steps, window_size, window_start))


def branch_grpo(
    steps: int,
    *,
    branching: int = 2,
    split_steps: Sequence[int] = (0, 3, 6, 9),
    deterministic_final_step: bool = False,
) -> RolloutPlan:
    """BranchGRPO: one root, every step stochastic, branching at the split steps."""
    for step in split_steps:
        if not 0 <= step < steps:
            raise PlanError(
                f"split_steps: got {step}; must lie in 0..{steps - 1}, since there are "
                f"{steps} steps"
            )
    children = tuple(branching if step in split_steps else 1 for step in range(steps))
    return RolloutPlan(1, children, _all(steps, deterministic_final_step))


def branch_grpo_splits(steps: int) -> tuple[int, ...]:
    """BranchGRPO's published split steps, 0, 3, 6 and 9 of 20, in proportion to another number.

    Those that fall on one step are one: few steps split less often.
    """
    nearest = ((2 * step * steps + 20) // 40 for step in (0, 3, 6, 9))
    return tuple(sorted(set(nearest)))


def _all(steps: int, deterministic_final_step: bool) -> tuple[bool, ...]:
    return (True,) * (steps - 1) + (not deterministic_final_step,)


def _window(steps: int, size: int, start: int) -> tuple[bool, ...]:
    if size < 1 or start < 0 or start + size > steps:
        raise PlanError(
            f"window: steps {start}..{start + size - 1} (window_start {start}, window_size {size}) "
            f"are not inside 0..{steps - 1}, since there are {steps} steps"
        )
    return tuple(start <= step < start + size for step in range(steps))


@dataclass(frozen=True)
class WindowSchedule:
    """Where the window starts at each iteration.

    Attributes:
        kind: `random` draws from the truncated geometric distribution of `probabilities`;
            `shifting` grows by `shift_by` every `shift_every` iterations and wraps around;
            `fixed` stays at `start`.
        decay: r in (0, 1] of the truncated geometric distribution; 1 is uniform.
        seed: with the iteration, decides the draw, so every rank and every resumed run agrees.
    """

    kind: Literal["random", "shifting", "fixed"]
    steps: int
    size: int
    start: int = 0
    decay: float = 0.5
    shift_by: int = 1
    shift_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        _window(self.steps, self.size, self.start)
        if not 0 < self.decay <= 1:
            raise PlanError(f"window decay: got {self.decay}; must be in (0, 1]")
        if self.shift_by < 1 or self.shift_every < 1:
            raise PlanError(
                f"window: got shift_by {self.shift_by} and shift_every {self.shift_every}; both "
                "must be at least 1"
            )

    @property
    def starts(self) -> int:
        """How many starts the window moves over: 0..T-w-1 as in the paper, or only 0 if w = T."""
        return max(self.steps - self.size, 1)

    @property
    def possible_starts(self) -> tuple[int, ...]:
        """Every start that `at` can return."""
        return (self.start,) if self.kind == "fixed" else tuple(range(self.starts))

    @property
    def probabilities(self) -> tuple[float, ...]:
        """`Pr[i] = (1 - r) r^i / (1 - r^(T-w))` for i in 0..T-w-1 (TreeGRPO, section 4)."""
        weights = [self.decay**start for start in range(self.starts)]
        return tuple(weight / sum(weights) for weight in weights)

    def at(self, iteration: int) -> int:
        """The window's first step in an iteration (counted from 0)."""
        if self.kind == "fixed":
            return self.start
        if self.kind == "shifting":
            return (self.start + iteration // self.shift_every * self.shift_by) % self.starts
        draw = random.Random(f"window {self.seed} {iteration}")
        return draw.choices(range(self.starts), weights=self.probabilities)[0]
