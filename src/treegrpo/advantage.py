"""Rewards to advantages: normalise the leaves within their group, then back them up the forest.

Both estimators, `backup` (TreeGRPO, and plain GRPO for a plan that never branches) and
`depth_normalized` (BranchGRPO), have one form: (leaf values, rollout) -> one tensor of edge
advantages per stochastic level. They know rewards and structure, nothing else.

Left out: what rewards are (`rewards/`) and which estimator a method takes (`methods/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from treegrpo.plan import RolloutPlan

Backup = Literal["logprob", "uniform", "sibling"]
StdScope = Literal["group", "global", "none"]


def normalize(
    values: Tensor,
    *,
    std: StdScope = "group",
    ddof: int = 0,
    eps: float = 1e-6,
    population: Tensor | None = None,
) -> Tensor:
    """`(value - group mean) / (std + eps)` per prompt; a group of equal values gets exactly zero.

    Args:
        values: [prompts, leaves].
        std: over the `group`, over all prompts (`global`), or `none` (divide by 1).
        ddof: 0 for the population's standard deviation, 1 for the unbiased one.
        population: any shape; the values the global std is taken over (all ranks'), by default
            `values`.
    """
    centered = values - values.mean(1, keepdim=True)
    if std == "group":
        scale = _std(values, ddof, dim=1) + eps
    elif std == "global":
        everything = (values if population is None else population).flatten()
        scale = _std(everything, ddof, dim=0) + eps
    else:
        scale = torch.ones_like(values[:1, :1])
    signal = ~without_signal(values)[:, None]
    return torch.where(signal, centered / scale, torch.zeros_like(values))


def without_signal(values: Tensor) -> Tensor:
    """Bool [prompts]: the groups whose values are all equal, from which nothing can be learned."""
    return values.amax(1) == values.amin(1)


def leaf_advantages(
    rewards: Sequence[Tensor],
    weights: Sequence[float],
    *,
    std: StdScope = "group",
    ddof: int = 0,
    eps: float = 1e-6,
    advantage_clip: float | None = None,
    populations: Sequence[Tensor] | None = None,
) -> Tensor:
    """Several rewards to one advantage per leaf (TreeGRPO, Algorithm 1, lines 11-13).

    Each reward is normalised by `normalize`, weighted and summed; the sum is normalised again over
    its group, so that the weights set proportions and not the step size.

    Args:
        rewards: one [prompts, leaves] tensor per reward.
        weights: one per reward, positive; what counts is each one's proportion to the largest.
        populations: one per reward, see `normalize`.

    Returns:
        float32 [prompts, leaves].
    """
    weights = [weight / max(weights) for weight in weights]
    combined = torch.zeros_like(rewards[0], dtype=torch.float32)
    for index, (reward, weight) in enumerate(zip(rewards, weights, strict=True)):
        population = None if populations is None else populations[index]
        normalized = normalize(reward.float(), std=std, ddof=ddof, eps=eps, population=population)
        combined = combined + weight * normalized
    if len(rewards) > 1 and std == "group":
        # Rewards that cancel leave rounding, which the division would blow up into a signal.
        spread = combined.amax(1, keepdim=True) - combined.amin(1, keepdim=True)
        rounding = 1e-5 * sum(weights)
        combined = torch.where(spread <= rounding, torch.zeros_like(combined), combined)
        combined = normalize(combined, ddof=ddof, eps=eps)
    if advantage_clip is not None:
        combined = combined.clamp(-advantage_clip, advantage_clip)
    return combined


@dataclass(frozen=True)
class EdgeAdvantages:
    """What an estimator returns.

    Attributes:
        levels: per stochastic level, float32 [prompts, edges] aligned with `Level.children`.
        effective_sample_size: mean of `1 / sum(weight^2)` over the nodes that branch, between 1
            (one sibling has all the weight) and k (uniform); nan where no node branches.
    """

    levels: tuple[Tensor, ...]
    effective_sample_size: float


def backup(
    leaf_values: Tensor,
    log_probs: Sequence[Tensor],
    plan: RolloutPlan,
    *,
    mode: Backup = "logprob",
    temperature: float = 1.0,
) -> EdgeAdvantages:
    """Back leaf advantages up the forest (TreeGRPO, Algorithm 1, lines 14-18).

    A node's value is the weighted sum of its children's; the edge into a node carries the node's
    value. Single children pass their value up, so for a plan that does not branch every edge of a
    trajectory gets its leaf's advantage: plain GRPO.

    Args:
        leaf_values: [prompts, leaves].
        log_probs: per stochastic level, [prompts, edges] under the policy that sampled.
        mode: the weights among siblings: `logprob` is softmax(log_prob / temperature), as in the
            paper; `uniform` is the Monte Carlo mean; `sibling` backs up as `uniform` but gives
            each edge its difference from its siblings' mean (zero for a single child).
        temperature: of `logprob`.
    """
    by_step = dict(zip(plan.stochastic_steps, log_probs, strict=True))
    edges: list[Tensor] = []
    sizes: list[Tensor] = []
    values = leaf_values.float()
    for step in reversed(range(plan.steps)):
        if not plan.stochastic[step]:
            continue
        siblings = _siblings(values, plan.branching[step])
        if mode == "logprob":
            scores = _siblings(by_step[step].float(), plan.branching[step])
            weights = torch.softmax(scores / temperature, dim=-1)
        else:
            weights = torch.full_like(siblings, 1 / plan.branching[step])
        node_values = (weights * siblings).sum(-1)
        if mode == "sibling":
            edges.append((siblings - node_values[..., None]).flatten(1))
        else:
            edges.append(values)
        if plan.branching[step] > 1:
            sizes.append(1 / weights.square().sum(-1).flatten())
        values = node_values
    size = torch.cat(sizes).mean().item() if sizes else float("nan")
    return EdgeAdvantages(tuple(reversed(edges)), size)


def depth_normalized(
    leaf_values: Tensor, plan: RolloutPlan, *, ddof: int = 0, eps: float = 1e-6
) -> EdgeAdvantages:
    """BranchGRPO (arXiv 2509.06040): the mean over a node's leaves, normalised within its depth.

    Args:
        leaf_values: [prompts, leaves] (rewards or leaf advantages; normalisation removes scale).
        ddof, eps: of the standard deviation over a depth's nodes, see `normalize`.

    Returns:
        Per stochastic level [prompts, edges]; zero at a depth with a single node.
    """
    levels = []
    for step in plan.stochastic_steps:
        leaves_per_node = plan.leaves // plan.widths[step + 1]
        means = _siblings(leaf_values.float(), leaves_per_node).mean(-1)
        levels.append(normalize(means, ddof=ddof, eps=eps))
    return EdgeAdvantages(tuple(levels), float("nan"))


def _std(values: Tensor, ddof: int, dim: int) -> Tensor:
    return values.std(dim, correction=min(ddof, values.shape[dim] - 1), keepdim=True)


def _siblings(values: Tensor, count: int) -> Tensor:
    """[prompts, n * count] -> [prompts, n, count]."""
    return values.reshape(values.shape[0], -1, count)
