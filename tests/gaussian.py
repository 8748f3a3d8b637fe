"""A data distribution whose perfect model is known in closed form, to check every step against.

Clean samples are Normal(mean, std^2 I). Then the model's output is linear in x, all transitions of
the library keep Gaussians Gaussian, and the moments of every level and the policy gradient of a
reward follow from a scalar recursion, written here from the numbers of a `Transition` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treegrpo.advantage import Backup, backup, leaf_advantages
from treegrpo.objective import Loss, losses
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


@dataclass(frozen=True)
class Reward:
    """A reward of a leaf whose expectation over a Gaussian is known.

    Attributes:
        value: [..., dimensions] -> [...].
        expected: from the leaf's mean [dimensions] and variance, differentiable in both.
    """

    value: Callable[[Tensor], Tensor]
    expected: Callable[[Tensor, float], Tensor]


def linear_reward(direction: Tensor) -> Reward:
    """`direction . leaf`."""
    return Reward(lambda leaf: leaf @ direction, lambda mean, variance: mean @ direction)


def quadratic_reward(target: Tensor) -> Reward:
    """`-|leaf - target|^2`."""
    return Reward(
        lambda leaf: -(leaf - target).square().sum(-1),
        lambda mean, variance: -(mean - target).square().sum() - len(target) * variance,
    )


def threshold_reward(direction: Tensor, offset: float) -> Reward:
    """`Phi(direction . leaf - offset)`, Phi the normal distribution function: a soft pass or fail.

    Its expectation under a projection Normal(m, v) is `Phi((m - offset) / sqrt(1 + v))`.
    """

    def expected(mean: Tensor, variance: float) -> Tensor:
        spread = math.sqrt(1 + variance * float(direction.square().sum()))
        probability: Tensor = torch.special.ndtr((mean @ direction - offset) / spread)
        return probability

    return Reward(lambda leaf: torch.special.ndtr(leaf @ direction - offset), expected)


def exact_gradients(
    gaussian: Gaussian, transitions: Sequence[Transition], reward: Reward
) -> Tensor:
    """[T, dimensions]: gradient of the expected reward with respect to every step's `shift` at 0.

    First-level states are Normal(0, 1), as a rollout's are.
    """
    shift = torch.zeros(
        len(transitions), len(gaussian.mean), dtype=torch.float64, requires_grad=True
    )
    mean, variance = moments(gaussian, transitions, torch.zeros_like(gaussian.mean), 1.0, shift)[-1]
    (gradient,) = torch.autograd.grad(reward.expected(mean, variance), shift)
    return gradient


def expected_factors(plan: RolloutPlan, mode: Backup) -> Tensor:
    """[T]: the share of each step's exact gradient that the objective's gradient has on average.

    The objective is a mean over all `plan.edges`, of which step t has `n = plan.widths[t + 1]`. An
    edge's score function is independent of every leaf that is not below it, and 1/n of the leaves
    are, so that

    - with the group's mean subtracted from the leaves, an edge has `1 - 1/n` of the gradient, and
      the step `(n - 1) / edges`;
    - with the mean of its k siblings subtracted, `1 - 1/k`, and the step `(n - n / k) / edges`,
      which is 0 where k is 1: no edge has a sibling to differ from.

    The weights of `logprob` depend on the draws, so that for it the first line holds only where
    the reward is at most quadratic: the weights are even in the draws, and their product with the
    reward's odd part averages to nothing.
    """
    factors = torch.zeros(plan.steps, dtype=torch.float64)
    for step in plan.stochastic_steps:
        edges = plan.widths[step + 1]
        baselines = plan.widths[step] if mode == "sibling" else 1
        factors[step] = (edges - baselines) / plan.edges
    return factors


def policy_gradients(
    gaussian: Gaussian,
    plan: RolloutPlan,
    transitions: tuple[Transition, ...],
    reward: Reward,
    *,
    mode: Backup,
    groups: int,
    generator: torch.Generator,
    objective: Callable[..., Iterator[Loss]] = losses,
) -> Tensor:
    """Independent estimates of the policy gradient by the library's whole path, one per group.

    Returns:
        float64 [groups, T, dimensions]: with respect to `shift`, at shift 0. Advantages are the
        reward minus the group's mean, log-probabilities are exact densities.
    """
    dimensions = len(gaussian.mean)
    shift = torch.zeros(groups, plan.steps, dimensions, dtype=torch.float64, requires_grad=True)
    policy = Gaussian(gaussian.schedule, gaussian.mean, gaussian.std, shift)
    noise = torch.randn(groups, plan.roots, dimensions, dtype=torch.float64, generator=generator)
    forest = rollout(
        policy,
        noise,
        plan,
        gaussian.schedule,
        transitions,
        reduction="sum",
        generator=generator,
    )
    values = leaf_advantages([reward.value(forest.leaves)], [1.0], std="none")
    edges = backup(values, [level.log_prob for level in forest.levels], plan, mode=mode)
    for loss in objective(policy, forest, edges.levels):
        loss.value.backward()  # type: ignore[no-untyped-call]
    assert shift.grad is not None
    # The loss is averaged over groups, and descends.
    return -shift.grad * groups
