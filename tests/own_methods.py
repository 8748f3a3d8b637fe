"""Methods as a user would write them, named in configurations as `own_methods:NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field

from treegrpo.advantage import backup
from treegrpo.methods import Credit, Method, Scores, Update
from treegrpo.methods.settings import GroupSettings, ObjectiveSettings
from treegrpo.methods.trees import TreeGRPO, TreeSettings
from treegrpo.objective import Loss
from treegrpo.plan import RolloutPlan
from treegrpo.rollout import Predict, Rollout


class BestSettings(TreeSettings):
    """How samples are grown."""

    best: Annotated[int, Field(ge=1)] = 1
    """Leaves of a prompt that are worth something."""


class BestLeaves(TreeGRPO):
    """A tree in which only the best leaves count: a method with its own setting and credit."""

    rollout_settings = BestSettings
    rollout: BestSettings

    def credit(self, scores: Scores, forest: Rollout) -> Credit:
        """One for the best leaves, backed up by the mean."""
        values = self.leaf_advantages(scores)
        bound = values.topk(self.rollout.best, dim=1).values[:, -1:]
        leaves = (values >= bound).float()
        return Credit.of(leaves, backup(leaves, forest.log_probs, forest.plan, mode="uniform"))


class ForwardProcessSettings(ObjectiveSettings):
    """What the forward-process loss is made of."""

    strength: Annotated[float, Field(gt=0)] = 1.0
    """How far the implicit positive and negative policies lie from the sampling one."""


class ForwardProcess(Method):
    """DiffusionNFT's loss (arXiv 2509.16117) on deterministic samples: no ratios, no edges.

    For rectified flows and one optimizer step an iteration, in which the sampling policy is the one
    under training.
    """

    rollout_settings = GroupSettings
    objective_settings = ForwardProcessSettings
    rollout: GroupSettings
    objective: ForwardProcessSettings
    needs_edges = False

    def plan(self, iteration: int) -> RolloutPlan:
        """Independent deterministic trajectories."""
        steps = self.rollout.steps
        return RolloutPlan(self.rollout.group_size, (1,) * steps, (False,) * steps)

    def update_forwards(self, plan: RolloutPlan) -> int:
        """One per leaf."""
        return plan.leaves

    def losses(self, predict: Predict, update: Update) -> Iterator[Loss]:
        """Leaves noised again to a random level: good ones pull the velocity, bad ones push it."""
        forest, credit, prompts = update.forest, update.credit, update.prompts
        device, strength = credit.leaves.device, self.objective.strength
        clip = self.advantage.advantage_clip or 5.0
        weights = (credit.leaves[prompts] / clip / 2 + 0.5).clamp(0, 1).flatten()
        leaves = forest.leaves[prompts].flatten(0, 1)
        owners = torch.arange(forest.leaves.shape[0], device=device)[prompts]
        owners = owners.repeat_interleave(forest.leaves.shape[1])
        # The samples are dealt out to the levels, as evenly as they go.
        steps = forest.plan.steps
        rows = [torch.arange(len(leaves), device=device)[step::steps] for step in range(steps)]
        split = [
            (step, torch.split(row, update.micro_batch))
            for step, row in enumerate(rows)
            if len(row)
        ]
        parts = [(step, part) for step, some in split for part in some]
        for number, (step, part) in enumerate(parts, start=1):
            clean, weight = leaves[part.to(leaves.device)].to(device), weights[part]
            sigma, noise = forest.schedule.sigma[step], torch.randn_like(clean)
            target = noise - clean
            velocity = predict((1 - sigma) * clean + sigma * noise, step, owners[part])
            old = velocity.detach()
            positive = old + strength * (velocity - old)
            negative = old - strength * (velocity - old)
            errors = [(v - target).square().flatten(1).mean(1) for v in (positive, negative)]
            each = weight * errors[0] + (1 - weight) * errors[1]
            yield Loss(
                each.sum() / len(leaves) / strength,
                len(clean),
                is_last=number == len(parts),
                means={"matching_error": errors[0].detach()},
            )
