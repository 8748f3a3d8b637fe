"""A data distribution whose perfect model is known in closed form, so that every step can be checked.

Clean samples are Normal(mean, std^2 I). Then the model's output is linear in x, all transitions of
the library keep Gaussians Gaussian, and the moments of every level and the policy gradient of a
reward follow from a scalar recursion, written here from the numbers of a `Transition` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treegrpo.advantage import Backup, backup, leaf_advantages
from treegrpo.objective import losses
from treegrpo.plan import RolloutPlan
from treegrpo.rollout import rollout
from treegrpo.transition import Schedule, Transition


@dataclass(frozen=True)
class Gaussian:
    """The distribution and its exact model, which is a `Predict`.

    Attributes:
        mean: float64 [dimensions].
        std: of every coordinate; 0 is a point mass.
        shift: [prompts, T, dimensions], added to a velocity model's output, for policy gradients:
            one parameter per step and coordinate, and one copy per prompt, so that one backward
            pass gives one independent gradient per prompt.
    """

    schedule: Schedule
    mean: Tensor
    std: float
    shift: Tensor | None = None

    def marginal(self, level: int) -> tuple[Tensor, float]:
        """Mean [dimensions] and variance of x at a level."""
        alpha, sigma = self.schedule.alpha[level], self.schedule.sigma[level]
        return alpha * self.mean, alpha**2 * self.std**2 + sigma**2

    def __call__(self, x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha[step], self.schedule.sigma[step]
        mean, variance = self.marginal(step)
        deviation = (x - mean.to(x.dtype)) / variance
        clean = self.mean.to(x.dtype) + alpha * self.std**2 * deviation
        noise = sigma * deviation
        match self.schedule.prediction:
            case "velocity":
                output = noise - clean
            case "epsilon":
                output = noise
            case "v_prediction":
                output = alpha * noise - sigma * clean
            case "sample":
                output = clean
        if self.shift is None:
            return output
        assert self.schedule.prediction == "velocity"
        return output + self.shift[prompt_index, step].to(x.dtype)


def moments(
    gaussian: Gaussian,
    transitions: Sequence[Transition],
    mean: Tensor,
    variance: float,
    shift: Tensor | None = None,
) -> list[tuple[Tensor, float]]:
    """Mean and variance of the sampled states at levels 0..T, exactly, from those at level 0.

    Args:
        mean: float64 [dimensions].
        shift: [T, dimensions] added to the velocity; the moments are differentiable in it.
    """
    levels = [(mean, variance)]
    for step, transition in enumerate(transitions):
        alpha, sigma = gaussian.schedule.alpha[step], gaussian.schedule.sigma[step]
        true_mean, true_variance = gaussian.marginal(step)
        clean, noise = transition.clean_weight, transition.noise_weight
        slope = (clean * alpha * gaussian.std**2 + noise * sigma) / true_variance
        mean = clean * gaussian.mean + slope * (mean - true_mean)
        if shift is not None:
            mean = mean + (noise * (1 - sigma) - clean * sigma) * shift[step]
        variance = slope**2 * variance + transition.std**2
        levels.append((mean, variance))
    return levels


def policy_gradients(
    gaussian: Gaussian,
    plan: RolloutPlan,
    transitions: tuple[Transition, ...],
    reward: Callable[[Tensor], Tensor],
    *,
    mode: Backup,
    groups: int,
    generator: torch.Generator,
) -> Tensor:
    """Independent estimates of the policy gradient from the library's whole path, one per group.

    Args:
        reward: [groups, leaves, dimensions] -> [groups, leaves].

    Returns:
        float64 [groups, T, dimensions]: with respect to `shift`, at shift 0. Advantages are the
        reward minus the group's mean, log-probabilities are exact densities.
    """
    dimensions = len(gaussian.mean)
    shift = torch.zeros(groups, plan.steps, dimensions, dtype=torch.float64, requires_grad=True)
    policy = Gaussian(gaussian.schedule, gaussian.mean, gaussian.std, shift)
    noise = torch.randn(
        groups, plan.roots, dimensions, dtype=torch.float64, generator=generator
    )
    forest = rollout(
        policy,
        noise,
        plan,
        gaussian.schedule,
        transitions,
        reduction="sum",
        generator=generator,
    )
    values = leaf_advantages([reward(forest.leaves)], [1.0], std="none")
    edges = backup(values, [level.log_prob for level in forest.levels], plan, mode=mode)
    for loss in losses(policy, forest, edges.levels):
        loss.backward()  # type: ignore[no-untyped-call]
    assert shift.grad is not None
    # The loss is averaged over groups, and descends.
    return -shift.grad * groups
