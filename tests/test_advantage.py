"""Rewards to leaf advantages, and the backup, against small forests worked out by hand."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import plans
from torch import Tensor

from treegrpo.advantage import (
    Backup,
    backup,
    depth_normalized,
    leaf_advantages,
    normalize,
    without_signal,
)
from treegrpo.plan import RolloutPlan, branch_grpo, dance_grpo, flow_grpo, mix_grpo, tree_grpo

REWARDS = torch.tensor([[1.0, 4.0, 2.0, 7.0], [0.5, 0.5, 0.25, -3.0]])
TREE = tree_grpo(3, branching=2, window_size=2)

# One prompt's tree: the root's children a and b, and their children's log-probabilities. The
# ratios of the weights are e^(log 3) = 3, 1 and e^(log 4) = 4.
LEAVES = torch.tensor([[8.0, 0.0, -1.0, 4.0]])
LOG_PROBS = [
    torch.tensor([[math.log(3.0), 0.0]]),
    torch.tensor([[0.5, 0.5, 0.0, math.log(4.0)]]),
]


def random_log_probs(plan: RolloutPlan, seed: int, prompts: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(prompts, plan.widths[step + 1], generator=generator)
        for step in plan.stochastic_steps
    ]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_normalize_is_numpys(ddof: int, eps: float) -> None:
    values = REWARDS.double().numpy()
    centered = values - values.mean(1, keepdims=True)
    for std, scale in (
        ("group", values.std(1, ddof=ddof, keepdims=True) + eps),
        ("global", values.std(ddof=ddof) + eps),
        ("none", 1.0),
    ):
        actual = normalize(REWARDS.double(), std=std, ddof=ddof, eps=eps)  # type: ignore[arg-type]
        np.testing.assert_allclose(actual.numpy(), centered / scale, rtol=1e-12)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_weights_set_proportions_and_not_the_step_size(
    std: Literal["group", "global", "none"],
) -> None:
    def advantages(*weights: float) -> Tensor:
        return leaf_advantages([REWARDS, REWARDS.square()][: len(weights)], weights, std=std)

    torch.testing.assert_close(advantages(0.01), advantages(1.0))
    torch.testing.assert_close(advantages(8e-30, 2e-30), advantages(0.8, 0.2))
    assert not torch.allclose(advantages(0.2, 0.8), advantages(0.8, 0.2))


def test_global_std_is_over_the_population_given() -> None:
    population = torch.tensor([0.0, 10.0, 20.0])
    actual = normalize(REWARDS, std="global", eps=0.0, population=population)
    centered = REWARDS - REWARDS.mean(1, keepdim=True)
    torch.testing.assert_close(actual, centered / math.sqrt(200 / 3))


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_groups_of_equal_rewards_get_exactly_zero(std: str, ddof: int) -> None:
    """Also where the mean of equal numbers is not that number (0.1 * 3 / 3), and with eps 0."""
    rewards = torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0]])
    actual = normalize(rewards, std=std, ddof=ddof, eps=0.0)  # type: ignore[arg-type]
    assert without_signal(rewards).tolist() == [True, False]
    assert torch.equal(actual[0], torch.zeros(3))
    assert actual[1].abs().max() > 0
    single = normalize(torch.tensor([[5.0]]), std=std, ddof=ddof, eps=0.0)  # type: ignore[arg-type]
    assert torch.equal(single, torch.zeros(1, 1))


def test_several_rewards_are_combined_by_weight_and_normalized_again() -> None:
    """[0, 2, 4] and [30, 0, 0] have z-scores sqrt(3/2) [-1, 0, 1] and [2, -1, -1] / sqrt(2)."""
    first, second = torch.tensor([[0.0, 2.0, 4.0]]), torch.tensor([[30.0, 0.0, 0.0]])
    root = math.sqrt(1.5), math.sqrt(0.5)
    combined = np.array(
        [-2 * root[0] + 0.5 * 2 * root[1], -0.5 * root[1], 2 * root[0] - 0.5 * root[1]]
    )
    expected = combined / combined.std()
    actual = leaf_advantages([first, second], [2.0, 0.5], eps=0.0)
    np.testing.assert_allclose(actual.numpy()[0], expected, rtol=1e-5)
    # Scales of rewards do not matter, and neither does a common factor of the weights.
    again = leaf_advantages([1000 * first, second - 7], [20.0, 5.0], eps=0.0)
    torch.testing.assert_close(again, actual, rtol=1e-5, atol=1e-5)


def test_advantages_are_clipped() -> None:
    actual = leaf_advantages([REWARDS], [1.0], advantage_clip=0.5)
    torch.testing.assert_close(actual, normalize(REWARDS).clamp(-0.5, 0.5))
    assert actual.abs().max() == 0.5


@pytest.mark.parametrize(
    ("mode", "temperature", "upper", "lower", "effective"),
    [
        # a = 8/2 + 0/2; b = -1/5 + 4 * 4/5. Nodes: 1/(9/16 + 1/16), 2, 1/(1/25 + 16/25).
        ("logprob", 1.0, [4.0, 3.0], [8.0, 0.0, -1.0, 4.0], (1.6 + 2 + 25 / 17) / 3),
        # Half the temperature squares the ratios: 9 : 1, 1 : 1, 1 : 16.
        (
            "logprob",
            0.5,
            [4.0, 63 / 17],
            [8.0, 0.0, -1.0, 4.0],
            (100 / 82 + 2 + 289 / 257) / 3,
        ),
        ("uniform", 1.0, [4.0, 1.5], [8.0, 0.0, -1.0, 4.0], 2.0),
        ("sibling", 1.0, [1.25, -1.25], [4.0, -4.0, -2.5, 2.5], 2.0),
    ],
)
def test_backup_by_hand(
    mode: Backup, temperature: float, upper: list[float], lower: list[float], effective: float
) -> None:
    edges = backup(LEAVES, LOG_PROBS, TREE, mode=mode, temperature=temperature)
    torch.testing.assert_close(edges.levels[0], torch.tensor([upper]))
    torch.testing.assert_close(edges.levels[1], torch.tensor([lower]))
    assert edges.effective_sample_size == pytest.approx(effective, rel=1e-6)


def test_the_roots_own_weights_do_not_reach_the_edges() -> None:
    """They would only weigh the root's value, which no edge carries."""
    other = [torch.tensor([[-5.0, 5.0]]), LOG_PROBS[1]]
    levels = backup(LEAVES, LOG_PROBS, TREE).levels
    for before, after in zip(levels, backup(LEAVES, other, TREE).levels, strict=True):
        assert torch.equal(before, after)


@settings(deadline=None)
@given(plans(), st.sampled_from(["logprob", "uniform", "sibling"]), st.floats(-3, 3))
def test_equal_leaves_give_equal_edges_and_nothing_to_tell_siblings_apart(
    plan: RolloutPlan, mode: Backup, value: float
) -> None:
    leaves = torch.full((2, plan.leaves), value)
    levels = backup(leaves, random_log_probs(plan, 0), plan, mode=mode).levels
    assert len(levels) == len(plan.stochastic_steps)
    for step, edges in zip(plan.stochastic_steps, levels, strict=True):
        expected = 0.0 if mode == "sibling" else value
        torch.testing.assert_close(
            edges, torch.full((2, plan.widths[step + 1]), expected), rtol=1e-5, atol=1e-5
        )


@settings(deadline=None)
@given(plans(), st.integers(0, 1000))
def test_uniform_backup_is_the_mean_over_the_leaves_below(plan: RolloutPlan, seed: int) -> None:
    leaves = torch.randn(2, plan.leaves, generator=torch.Generator().manual_seed(seed))
    log_probs = random_log_probs(plan, seed)
    uniform = backup(leaves, log_probs, plan, mode="uniform").levels
    sibling = backup(leaves, log_probs, plan, mode="sibling").levels
    for step, value, local in zip(plan.stochastic_steps, uniform, sibling, strict=True):
        below = plan.leaves // plan.widths[step + 1]
        for row in range(plan.widths[step + 1]):
            mean = leaves[:, row * below : (row + 1) * below].mean(1)
            torch.testing.assert_close(value[:, row], mean)
            first = row // plan.branching[step] * plan.branching[step]
            siblings = value[:, first : first + plan.branching[step]].mean(1)
            torch.testing.assert_close(local[:, row], value[:, row] - siblings)


@pytest.mark.parametrize(
    "plan",
    [
        flow_grpo(4, group_size=4),
        mix_grpo(4, group_size=4, window_size=2, window_start=1),
        dance_grpo(4, group_size=4),
    ],
    ids=["flow", "mix", "dance"],
)
@pytest.mark.parametrize("mode", ["logprob", "uniform"])
def test_a_flat_plan_gives_every_edge_its_trajectorys_advantage(
    plan: RolloutPlan, mode: Backup
) -> None:
    leaves = normalize(REWARDS)
    levels = backup(leaves, random_log_probs(plan, 0), plan, mode=mode).levels
    assert len(levels) == len(plan.stochastic_steps)
    for edges in levels:
        assert torch.equal(edges, leaves)


def test_effective_sample_size_runs_from_one_sibling_to_all() -> None:
    plan = tree_grpo(3, branching=3, window_size=2)
    log_probs = random_log_probs(plan, 0)
    leaves = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    hot = backup(leaves, log_probs, plan, temperature=1e6)
    cold = backup(leaves, log_probs, plan, temperature=1e-6)
    assert hot.effective_sample_size == pytest.approx(3.0, abs=1e-4)
    assert cold.effective_sample_size == pytest.approx(1.0, abs=1e-4)
    # At both ends the values are known too: the siblings' mean, and the likeliest child's.
    torch.testing.assert_close(hot.levels[0], leaves.view(2, 3, 3).mean(2), rtol=1e-4, atol=1e-4)
    likeliest = log_probs[1].view(2, 3, 3).argmax(2, keepdim=True)
    torch.testing.assert_close(cold.levels[0], leaves.view(2, 3, 3).gather(2, likeliest)[..., 0])
    flat = flow_grpo(2, group_size=4)
    assert math.isnan(backup(REWARDS, random_log_probs(flat, 0), flat).effective_sample_size)


def test_branch_grpo_normalizes_each_depth_by_hand() -> None:
    """Leaves 8, 0, -1, 4: the first split, at step 1, has means 4 and 1.5, with z-scores 1 and -1;
    the leaves' mean is 2.75 and their variance 12.6875."""
    plan = branch_grpo(4, branching=2, split_steps=(1, 2))
    edges = depth_normalized(LEAVES, plan).levels
    leaf_scores = (LEAVES - 2.75) / math.sqrt(12.6875)
    torch.testing.assert_close(edges[0], torch.zeros(1, 1))
    torch.testing.assert_close(edges[1], torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(edges[2], leaf_scores)
    torch.testing.assert_close(edges[3], leaf_scores)


@pytest.mark.parametrize(("difference", "signal"), [(1e-3, True), (0.03, True), (1e-7, False)])
def test_rewards_that_nearly_cancel_still_teach(difference: float, signal: bool) -> None:
    """What is left of two opposed rewards is a signal as long as it is more than rounding."""
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    opposed = -values + difference * torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    advantages = leaf_advantages([values, opposed], [1.0, 1.0])
    assert (advantages.abs().max() > 0.5) == signal
