"""Grow the forest: from noise to leaves, keeping what the update needs and nothing else.

The whole frontier of all prompts is one batch, computed in parts of `max_batch` rows, so that what
a step needs beside the states does not grow with their number. Kept are, per stochastic step, the
nodes, their sampled children and the log-probabilities, and the leaves; deterministic steps leave
nothing behind.

Left out: the model (`models/`) and decoding what was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from treegrpo.plan import PlanError, RolloutPlan
from treegrpo.transition import (
    Reduction,
    Schedule,
    Transition,
    clean_and_noise,
    log_prob,
)


class Predict(Protocol):
    """The model, seen from the algorithm."""

    def __call__(self, x: Tensor, step: int, prompt_index: Tensor, /) -> Tensor:
        """The model's output.

        Args:
            x: [rows, ...] states at level `step` of the schedule.
            step: the schedule's step, 0..T-1.
            prompt_index: int64 [rows], which of the iteration's prompts each row belongs to.

        Returns:
            [rows, ...]: what the schedule's `prediction` says.
        """


@dataclass(frozen=True)
class Level:
    """One stochastic step of the forest, for all prompts.

    Attributes:
        step: the schedule's step.
        transition: its Gaussian.
        nodes: [prompts, n, ...] the parents' states.
        children: [prompts, n * k, ...] their sampled children, siblings side by side.
        log_prob: float32 [prompts, n * k], of each child under the policy that sampled it.
        mean: float32 [prompts, n, ...] of each node's Gaussian when it was sampled, or None.
    """

    step: int
    transition: Transition
    nodes: Tensor
    children: Tensor
    log_prob: Tensor
    mean: Tensor | None = None

    @property
    def branching(self) -> int:
        """Children of each node, k."""
        return self.children.shape[1] // self.nodes.shape[1]


@dataclass(frozen=True)
class Rollout:
    """A sampled forest.

    Attributes:
        leaves: [prompts, leaves, ...] the finished samples.
        levels: the stochastic steps, in order.
        forwards: model forwards (rows) that it took.
    """

    plan: RolloutPlan
    schedule: Schedule
    leaves: Tensor
    levels: tuple[Level, ...]
    forwards: int
    reduction: Reduction

    @property
    def log_probs(self) -> tuple[Tensor, ...]:
        """Per stochastic level, float32 [prompts, edges]."""
        return tuple(level.log_prob for level in self.levels)


@torch.no_grad()
def rollout(
    predict: Predict,
    noise: Tensor,
    plan: RolloutPlan,
    schedule: Schedule,
    transitions: tuple[Transition, ...],
    *,
    max_batch: int | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    keep_means: bool = False,
    device: torch.device | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Rollout:
    """Sample the forest of every prompt.

    Args:
        predict: the model.
        noise: [prompts, roots, ...] states at the first level; its dtype and device are those of
            all states.
        transitions: one per step, from `treegrpo.transition.transitions`.
        max_batch: at most so many rows per model call; does not change the result.
        reduction: of the log-probabilities over a state's dimensions.
        generator: of the stochastic steps' draws. One per prompt makes a prompt's samples
            independent of what else is in the batch.
        keep_means: also keep each node's mean (the GRPO-Guard objective needs it).
        device: where the model and the log-probabilities are; None: with the states. States that
            are kept on the CPU come here `max_batch` rows at a time.
        observe: called with (step, clean estimates [prompts, n, ...]) at every step, for pictures.

    Raises:
        PlanError: the noise's second dimension is not the plan's roots.
    """
    if noise.shape[1] != plan.roots:
        raise PlanError(f"noise: got {noise.shape[1]} roots per prompt; the plan has {plan.roots}")
    prompts, shape = noise.shape[0], noise.shape[2:]
    device = device or noise.device
    levels: list[Level] = []
    forwards = 0
    frontier, previous = noise, None
    for step, transition in enumerate(transitions):
        level = plan.levels[step]
        width, children = plan.widths[step], plan.branching[step]
        sampled = plan.stochastic[step]
        prompt_index = torch.arange(prompts, device=device).repeat_interleave(width)
        rows = frontier.flatten(0, 1)
        draws = _draws(prompts, width * children, noise, generator) if sampled else None
        following = torch.empty(
            len(rows) * children, *shape, dtype=noise.dtype, device=noise.device
        )
        scores, means, estimates = [], [], []
        # A second-order step reads the clean estimates of the step before it.
        is_read = step + 1 < plan.steps and transitions[step + 1].previous_weight != 0
        cleans = []
        for start in range(0, len(rows), max_batch or len(rows)):
            end = min(start + (max_batch or len(rows)), len(rows))
            x = rows[start:end].to(device)
            output = predict(x, level, prompt_index[start:end])
            clean, noise_estimate = clean_and_noise(output, x, schedule, level)
            before = None if previous is None else previous[start:end].to(device)
            mean = transition.mean(clean, noise_estimate, before)
            if is_read:
                cleans.append(clean.to(noise.device))
            if observe is not None:
                estimates.append(clean)
            if draws is None:
                following[start:end] = mean
                continue
            own = slice(start * children, end * children)
            each = mean.repeat_interleave(children, 0)
            # Rounded to the states' dtype first, so that the stored state and its number agree.
            state = (each + transition.std * draws[own].to(device)).to(noise.dtype)
            scores.append(log_prob(state, each, transition.std, reduction))
            following[own] = state
            if keep_means:
                means.append(mean.to(noise.device))
        forwards += len(rows)
        previous = torch.cat(cleans) if is_read else None
        if observe is not None:
            observe(step, torch.cat(estimates).view(prompts, width, *shape))
        following = following.view(prompts, -1, *shape)
        if sampled:
            levels.append(
                Level(
                    level,
                    transition,
                    nodes=frontier,
                    children=following,
                    log_prob=torch.cat(scores).view(prompts, width * children),
                    mean=torch.cat(means).view(prompts, width, *shape) if keep_means else None,
                )
            )
        frontier = following
    return Rollout(plan, schedule, frontier, tuple(levels), forwards, reduction)


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """The forests of several batches of prompts as one; all must follow the same plan."""
    first = rollouts[0]
    if len(rollouts) == 1:
        return first
    levels = []
    for same_step in zip(*(r.levels for r in rollouts), strict=True):
        means = [level.mean for level in same_step if level.mean is not None]
        levels.append(
            Level(
                same_step[0].step,
                same_step[0].transition,
                nodes=torch.cat([level.nodes for level in same_step]),
                children=torch.cat([level.children for level in same_step]),
                log_prob=torch.cat([level.log_prob for level in same_step]),
                mean=torch.cat(means) if means else None,
            )
        )
    leaves = torch.cat([r.leaves for r in rollouts])
    forwards = sum(r.forwards for r in rollouts)
    return Rollout(first.plan, first.schedule, leaves, tuple(levels), forwards, first.reduction)


def _draws(
    prompts: int,
    per_prompt: int,
    like: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """Standard normal [prompts * per_prompt, ...] where the states are."""
    shape, dtype = like.shape[2:], like.dtype
    # Half precision would round the draws twice.
    wide = dtype if dtype == torch.float64 else torch.float32
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return torch.randn(
            prompts * per_prompt, *shape, generator=generator, device=device, dtype=wide
        ).to(like.device)
    parts = [
        torch.randn(per_prompt, *shape, generator=one, device=one.device, dtype=wide)
        for one in generator
    ]
    return torch.cat([part.to(like.device) for part in parts])
