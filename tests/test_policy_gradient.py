"""Rollout, advantages, backup and objective together estimate the exact policy gradient."""

from __future__ import annotations

import pytest
import torch
from gaussian import (
    Gaussian,
    Reward,
    exact_gradients,
    expected_factors,
    linear_reward,
    policy_gradients,
    quadratic_reward,
    threshold_reward,
)

from treegrpo.advantage import Backup
from treegrpo.objective import endpoint_losses
from treegrpo.plan import RolloutPlan, dance_grpo, mix_grpo, tree_grpo
from treegrpo.transition import flow_schedule, transitions

STEPS = 5
SCHEDULE = flow_schedule([3 * t / (1 + 2 * t) for t in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)])
GAUSSIAN = Gaussian(SCHEDULE, torch.tensor([1.0, -0.5], dtype=torch.float64), 0.6)
DIRECTION = torch.tensor([1.0, -2.0], dtype=torch.float64)
TARGET = torch.tensor([-1.0, 1.5], dtype=torch.float64)

LINEAR, QUADRATIC = linear_reward(DIRECTION), quadratic_reward(TARGET)
THRESHOLD = threshold_reward(DIRECTION, 1.0)

FLAT = mix_grpo(STEPS, group_size=6, window_size=3, window_start=1)
TREE = tree_grpo(STEPS, branching=3, window_size=2, window_start=1)
# Two roots, unequal branching, and a stochastic step that does not branch.
UNEVEN = RolloutPlan(2, (1, 3, 1, 2, 1), (False, True, True, True, False))


def test_the_exact_gradient_is_the_product_of_slopes() -> None:
    """The reference itself: for a linear reward a shift at step t reaches the leaf through that
    step's coefficient and the slopes of the later steps, all written out for the rectified flow."""
    steps = transitions(SCHEDULE, (True,) * STEPS)
    actual = exact_gradients(GAUSSIAN, steps, LINEAR)
    reach = 1.0
    for step in reversed(range(STEPS)):
        sigma, dt = SCHEDULE.sigma[step], SCHEDULE.sigma[step + 1] - SCHEDULE.sigma[step]
        squared = 0.7**2 * sigma / (1 - (SCHEDULE.sigma[1] if step == 0 else sigma))
        coefficient = (1 + squared * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(actual[step], coefficient * reach * DIRECTION)
        variance = (1 - sigma) ** 2 * 0.6**2 + sigma**2
        velocity_slope = (sigma - (1 - sigma) * 0.6**2) / variance
        reach *= 1 + squared * dt / (2 * sigma) + velocity_slope * coefficient


@pytest.mark.parametrize(
    ("plan", "mode", "reward"),
    [
        (FLAT, "uniform", LINEAR),
        (FLAT, "uniform", THRESHOLD),
        (dance_grpo(STEPS, group_size=6), "uniform", QUADRATIC),
        (TREE, "uniform", LINEAR),
        (TREE, "uniform", THRESHOLD),
        (TREE, "sibling", QUADRATIC),
        (TREE, "logprob", LINEAR),
        (TREE, "logprob", QUADRATIC),
        (UNEVEN, "uniform", QUADRATIC),
        (UNEVEN, "sibling", THRESHOLD),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_estimates_are_unbiased_up_to_the_known_factor(
    plan: RolloutPlan, mode: Backup, reward: Reward
) -> None:
    """Each step and coordinate within 5 standard errors of factor times exact gradient."""
    groups = 4000
    steps = transitions(SCHEDULE, plan.stochastic)
    estimates = policy_gradients(
        GAUSSIAN,
        plan,
        steps,
        reward,
        mode=mode,
        groups=groups,
        generator=torch.Generator().manual_seed(0),
    )
    factors = expected_factors(plan, mode)
    expected = factors[:, None] * exact_gradients(GAUSSIAN, steps, reward)
    standard_error = estimates.std(0) / groups**0.5
    # Advantages are float32, which leaves zero and equal means equal up to its rounding.
    assert ((estimates.mean(0) - expected).abs() <= 5 * standard_error + 1e-9).all()
    # The bound is narrow enough to see a wrong factor: 1 - 1/n against 1 differs by a sixth.
    assert 5 * standard_error.max() < 0.2 * expected.abs().max()
    for step in range(STEPS):
        if factors[step] == 0:
            assert estimates[:, step].abs().max() == 0


@pytest.mark.parametrize("tail", [None, 1], ids=["whole", "fast"])
def test_the_endpoint_objective_points_along_the_policy_gradient(tail: int | None) -> None:
    """For a linear reward, whose gradient has one direction: on average there is no part across it,
    at any step, and a positive one along it. So too with a shortened tail."""
    groups = 4000
    plan = TREE if tail is None else TREE.with_tail(tail)
    steps = transitions(SCHEDULE, TREE.stochastic)
    estimates = policy_gradients(
        GAUSSIAN,
        plan,
        transitions(SCHEDULE, plan.stochastic, levels=plan.levels),
        LINEAR,
        mode="uniform",
        groups=groups,
        generator=torch.Generator().manual_seed(0),
        objective=endpoint_losses,
    )[:, list(TREE.stochastic_steps)]
    exact = exact_gradients(GAUSSIAN, steps, LINEAR)[list(TREE.stochastic_steps)]
    along = torch.nn.functional.normalize(exact, dim=-1)
    across = torch.stack([-along[:, 1], along[:, 0]], dim=-1)
    for axis, has_part in ((along, True), (across, False)):
        parts = (estimates * axis).sum(-1)
        standard_error = parts.std(0) / groups**0.5
        if has_part:
            assert (parts.mean(0) > 20 * standard_error).all()
        else:
            assert (parts.mean(0).abs() <= 5 * standard_error + 1e-9).all()
