"""Grow the forest: from noise to leaves, keeping what the update needs and nothing else.

The whole frontier of all prompts is one batch, split only where it exceeds `max_batch` rows. Kept
are, per stochastic step, the nodes, their sampled children and the log-probabilities, and the
leaves; deterministic steps leave nothing behind, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable
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
            x: [rows, ...] states at level `step`.
            step: the denoising step, 0..T-1.
            prompt_index: int64 [rows], which of the iteration's prompts each row belongs to.

        Returns:
            [rows, ...]: what the schedule's `prediction` says.
        """


@dataclass(frozen=True)
class Level:
    """One stochastic step of the forest, for all prompts.

    Attributes:
        step: the denoising step.
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
    generator: torch.Generator | None = None,
    keep_means: bool = False,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Rollout:
    """Sample the forest of every prompt.

    Args:
        predict: the model.
        noise: [prompts, roots, ...] states at the first level; its dtype is the states' dtype.
        transitions: one per step, from `treegrpo.transition.transitions`.
        max_batch: at most so many rows per model call; does not change the result.
        reduction: of the log-probabilities over a state's dimensions.
        generator: of the stochastic steps' draws, on the noise's device.
        keep_means: also keep each node's mean (the GRPO-Guard objective needs it).
        observe: called with (step, clean estimates [prompts, n, ...]) at every step, for pictures.

    Raises:
        PlanError: the noise's second dimension is not the plan's roots.
    """
    if noise.shape[1] != plan.roots:
        raise PlanError(f"noise: got {noise.shape[1]} roots per prompt; the plan has {plan.roots}")
    prompts, shape = noise.shape[0], noise.shape[2:]
    levels: list[Level] = []
    forwards = 0
    frontier = noise
    for step, transition in enumerate(transitions):
        width, children = plan.widths[step], plan.branching[step]
        prompt_index = torch.arange(prompts, device=noise.device).repeat_interleave(width)
        rows = frontier.flatten(0, 1)
        output = _in_batches(predict, rows, step, prompt_index, max_batch)
        forwards += len(rows)
        clean, noise_estimate = clean_and_noise(output, rows, schedule, step)
        if observe is not None:
            observe(step, clean.view(prompts, width, *shape))
        mean = transition.mean(clean, noise_estimate)
        if not plan.stochastic[step]:
            frontier = mean.to(noise.dtype).view(prompts, width, *shape)
            continue
        means = mean.repeat_interleave(children, 0)
        draws = torch.randn(
            means.shape, generator=generator, device=means.device, dtype=means.dtype
        )
        # Rounded to the states' dtype first, so that the stored state and its number agree.
        sampled = (means + transition.std * draws).to(noise.dtype)
        scores = log_prob(sampled, means, transition.std, reduction)
        next_frontier = sampled.view(prompts, width * children, *shape)
        levels.append(
            Level(
                step,
                transition,
                nodes=frontier,
                children=next_frontier,
                log_prob=scores.view(prompts, width * children),
                mean=mean.view(prompts, width, *shape) if keep_means else None,
            )
        )
        frontier = next_frontier
    return Rollout(plan, schedule, frontier, tuple(levels), forwards, reduction)


def _in_batches(
    predict: Predict, rows: Tensor, step: int, prompt_index: Tensor, max_batch: int | None
) -> Tensor:
    size = max_batch or len(rows)
    parts = [
        predict(part, step, index)
        for part, index in zip(
            torch.split(rows, size), torch.split(prompt_index, size), strict=True
        )
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
