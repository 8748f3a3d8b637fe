"""Plans, their counts (against a model that counts), their errors, and the window's schedule."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from treegrpo.objective import losses
from treegrpo.plan import (
    PlanError,
    RolloutPlan,
    WindowSchedule,
    branch_grpo,
    dance_grpo,
    flow_grpo,
    mix_grpo,
    tree_grpo,
)
from treegrpo.rollout import rollout
from treegrpo.transition import Schedule, Transition, flow_schedule, transitions


@st.composite
def plans(draw: st.DrawFn) -> RolloutPlan:
    """Any valid plan with at most 150 leaves."""
    branching = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    stochastic = [children > 1 or draw(st.booleans()) for children in branching]
    plan = RolloutPlan(draw(st.integers(1, 3)), tuple(branching), tuple(stochastic))
    assume(plan.leaves <= 150)
    return plan


@pytest.mark.parametrize(
    ("plan", "roots", "branching", "stochastic"),
    [
        (
            tree_grpo(5, branching=3, window_size=2, window_start=1, trees=2),
            2,
            (1, 3, 3, 1, 1),
            (False, True, True, False, False),
        ),
        (flow_grpo(3, group_size=8), 8, (1, 1, 1), (True, True, True)),
        (
            flow_grpo(3, group_size=8, deterministic_final_step=True),
            8,
            (1, 1, 1),
            (True, True, False),
        ),
        (dance_grpo(3, group_size=8), 1, (8, 1, 1), (True, True, True)),
        (
            mix_grpo(5, group_size=6, window_size=2, window_start=3),
            6,
            (1, 1, 1, 1, 1),
            (False, False, False, True, True),
        ),
        (
            branch_grpo(5, branching=2, split_steps=(0, 3), deterministic_final_step=True),
            1,
            (2, 1, 1, 2, 1),
            (True, True, True, True, False),
        ),
    ],
    ids=["tree", "flow", "flow-final", "dance", "mix", "branch"],
)
def test_every_method_is_its_plan(
    plan: RolloutPlan, roots: int, branching: tuple[int, ...], stochastic: tuple[bool, ...]
) -> None:
    assert plan == RolloutPlan(roots, branching, stochastic)


@pytest.mark.parametrize("start", range(8))
def test_tree_counts(start: int) -> None:
    plan = tree_grpo(10, branching=3, window_size=3, window_start=start)
    assert plan.leaves == 27
    assert plan.edges == 3 + 9 + 27
    assert plan.rollout_forwards == start + 13 + 27 * (7 - start)
    assert plan.update_forwards == 13


def test_flat_counts() -> None:
    flow, mix = flow_grpo(10, group_size=27), mix_grpo(10, group_size=27, window_size=3)
    assert (flow.rollout_forwards, flow.update_forwards) == (270, 270)
    assert (mix.rollout_forwards, mix.update_forwards) == (270, 81)


@pytest.mark.parametrize(
    "plan",
    [
        tree_grpo(6, branching=3, window_size=2, window_start=2, trees=2),
        flow_grpo(6, group_size=5),
        dance_grpo(6, group_size=5),
        mix_grpo(6, group_size=5, window_size=2, window_start=1),
        branch_grpo(6, split_steps=(0, 4)),
        tree_grpo(6, branching=2, window_size=2, window_start=1).with_tail(2),
        mix_grpo(6, group_size=5, window_size=1).with_tail(3),
    ],
    ids=["tree", "flow", "dance", "mix", "branch", "tree-tail", "mix-tail"],
)
def test_counts_are_those_of_a_real_rollout_and_update(plan: RolloutPlan) -> None:
    prompts, rows = 3, Counter[str]()
    phase = "rollout"

    def predict(x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
        rows[phase] += len(x)
        return torch.zeros_like(x)

    schedule = flow_schedule([1 - level / 6 for level in range(7)])
    noise = torch.randn(prompts, plan.roots, 2)
    forest = rollout(
        predict, noise, plan, schedule, transitions(schedule, plan.stochastic, levels=plan.levels)
    )
    phase = "update"
    advantages = [torch.zeros_like(level.log_prob) for level in forest.levels]
    parts = list(losses(predict, forest, advantages, micro_batch=4))

    assert rows["rollout"] == forest.forwards == prompts * plan.rollout_forwards
    assert rows["update"] == sum(part.forwards for part in parts) == prompts * plan.update_forwards
    assert sum(part.means["kl"].numel() for part in parts) == prompts * plan.edges
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert forest.leaves.shape == (prompts, plan.leaves, 2)


@pytest.mark.parametrize("start", range(8))
def test_a_tail_has_at_most_so_many_steps_over_the_levels_that_were_left(start: int) -> None:
    whole = tree_grpo(10, branching=3, window_size=3, window_start=start)
    plan = whole.with_tail(3)
    left = 7 - start
    if left <= 3:
        assert plan == whole
    assert plan.rollout_forwards == start + 13 + 27 * min(3, left)
    assert (plan.leaves, plan.update_forwards, plan.edges) == (27, 13, 39)
    assert plan.levels[: start + 4] == tuple(range(start + 4))
    assert plan.levels[-1] == 10
    taken = [after - before for before, after in pairwise(plan.levels[start + 3 :])]
    assert sum(taken) == left
    assert not taken or max(taken) - min(taken) <= 1  # spread evenly


def test_only_deterministic_steps_skip_levels() -> None:
    with pytest.raises(PlanError, match=r"levels: got \(0, 2, 3\); .* by 1 at a stochastic step"):
        RolloutPlan(1, (2, 1), (True, False), (0, 2, 3))
    with pytest.raises(PlanError, match="they must rise"):
        RolloutPlan(1, (2, 1), (True, False), (0, 1, 1))
    with pytest.raises(PlanError, match="levels: got 2; a plan of 2 steps has 3"):
        RolloutPlan(1, (2, 1), (True, False), (0, 1))
    with pytest.raises(PlanError, match="tail_steps: got 0"):
        tree_grpo(5).with_tail(0)


@given(plans())
def test_counts_are_those_of_paths_written_out(plan: RolloutPlan) -> None:
    """Against the forest as a list of paths (root, child, child, ...) per level."""
    levels = [
        list(product(range(plan.roots), *(range(k) for k in plan.branching[:level])))
        for level in range(plan.steps + 1)
    ]
    assert plan.widths == tuple(map(len, levels))
    assert plan.leaves == len(levels[-1])
    sampled = [step for step in range(plan.steps) if plan.stochastic[step]]
    assert plan.edges == sum(len(levels[step + 1]) for step in sampled)
    assert plan.update_forwards == sum(len(levels[step]) for step in sampled)
    for step in range(plan.steps):
        for row, path in enumerate(levels[step + 1]):
            assert levels[step].index(path[:-1]) == row // plan.branching[step]


@settings(max_examples=40, deadline=None)
@given(plans())
def test_rollout_gives_row_j_the_parent_j_over_k(plan: RolloutPlan) -> None:
    """Each step's noise is a hundredth of the last one's: a state's nearest node is its parent."""
    prompts, dimensions = 2, 8
    steps = tuple(
        Transition(1.0, 0.0, 100.0**-step if sampled else 0.0)
        for step, sampled in enumerate(plan.stochastic, start=1)
    )
    # A model that finds every state clean already, so that deterministic steps keep it.
    schedule = Schedule(
        (1.0,) * (plan.steps + 1),
        tuple(float(plan.steps - level) for level in range(plan.steps + 1)),
        "sample",
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(prompts, plan.roots, dimensions, dtype=torch.float64, generator=generator)

    def predict(x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
        roots = _nearest(x, noise.flatten(0, 1))
        assert torch.equal(prompt_index, roots // plan.roots)
        return x

    forest = rollout(predict, noise, plan, schedule, steps, generator=generator)

    states = noise
    assert [level.step for level in forest.levels] == list(plan.stochastic_steps)
    for level in forest.levels:
        k = plan.branching[level.step]
        assert level.branching == k
        assert torch.equal(level.nodes, states)
        assert level.children.shape == (prompts, plan.widths[level.step + 1], dimensions)
        parents = _nearest(level.children, level.nodes)
        assert torch.equal(parents, (torch.arange(parents.shape[1]) // k).expand_as(parents))
        states = level.children
    assert torch.equal(forest.leaves, states)


def _nearest(points: Tensor, candidates: Tensor) -> Tensor:
    """Index of the candidate nearest to each point, from differences (not from dot products)."""
    return (points[..., :, None, :] - candidates[..., None, :, :]).square().sum(-1).argmin(-1)


@pytest.mark.parametrize(
    ("roots", "branching", "stochastic", "message"),
    [
        (0, (1,), (True,), r"roots: got 0"),
        (1, (), (), r"branching: got no steps"),
        (1, (1, 1), (True,), r"branching has 2 steps but stochastic has 1"),
        (1, (1, 0), (True, True), r"branching\[1\]: got 0"),
        (1, (1, 3), (True, False), r"branching\[1\]: got 3 children on a deterministic step"),
    ],
)
def test_impossible_plans_are_refused_by_field_and_value(
    roots: int, branching: tuple[int, ...], stochastic: tuple[bool, ...], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        RolloutPlan(roots, branching, stochastic)


def test_windows_and_splits_outside_the_steps_are_refused() -> None:
    with pytest.raises(PlanError, match=r"steps 8\.\.10 .* not inside 0\.\.9"):
        tree_grpo(10, window_size=3, window_start=8)
    with pytest.raises(PlanError, match=r"window_start -1"):
        mix_grpo(10, group_size=4, window_size=3, window_start=-1)
    with pytest.raises(PlanError, match=r"window_size 0"):
        tree_grpo(10, window_size=0)
    with pytest.raises(PlanError, match=r"split_steps: got 9; must lie in 0\.\.7"):
        branch_grpo(8)
    with pytest.raises(PlanError, match=r"branching\[0\]: got 4 children on a deterministic"):
        dance_grpo(1, group_size=4, deterministic_final_step=True)


def test_too_many_leaves_are_refused_with_the_arithmetic() -> None:
    plan = tree_grpo(10, branching=3, window_size=3, trees=2)
    plan.check_leaves(54)
    with pytest.raises(PlanError, match=r"2 x 3 x 3 x 3 = 54 leaves per prompt .* max_leaves = 53"):
        plan.check_leaves(53)


def test_window_probabilities_are_the_papers() -> None:
    r, starts = 0.3, 7
    window = WindowSchedule("random", steps=10, size=3, decay=r)
    expected = [(1 - r) * r**i / (1 - r**starts) for i in range(starts)]
    assert window.probabilities == pytest.approx(expected, rel=1e-12)
    assert replace(window, decay=1.0).probabilities == pytest.approx([1 / 7] * 7, rel=1e-12)
    assert replace(window, size=10).probabilities == (1.0,)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_window_frequencies(decay: float) -> None:
    window = WindowSchedule("random", steps=10, size=3, decay=decay)
    draws = 4000
    counts = Counter(window.at(iteration) for iteration in range(draws))
    assert set(counts) <= set(range(7))
    expected = [draws * probability for probability in window.probabilities]
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected))
    assert chi_square < 22.46  # the 99.9th percentile at 6 degrees of freedom


def test_window_draw_depends_on_seed_and_iteration_only() -> None:
    window = WindowSchedule("random", steps=10, size=3, decay=0.9, seed=3)
    forward = [window.at(iteration) for iteration in range(50)]
    again = replace(window)
    assert [again.at(iteration) for iteration in reversed(range(50))] == forward[::-1]
    other = replace(window, seed=4)
    assert [other.at(iteration) for iteration in range(50)] != forward


def test_window_shifts_and_wraps() -> None:
    window = WindowSchedule("shifting", steps=10, size=3, start=2, shift_by=3, shift_every=25)
    starts = [window.at(iteration) for iteration in range(0, 125, 25)]
    assert starts == [2, 5, 1, 4, 0]
    assert [window.at(iteration) for iteration in (24, 25, 49, 50)] == [2, 5, 5, 1]
    fixed = WindowSchedule("fixed", steps=10, size=3, start=7)
    assert {fixed.at(iteration) for iteration in range(100)} == {7}


def test_window_schedule_refuses_what_cannot_be() -> None:
    with pytest.raises(PlanError, match=r"window decay: got 0"):
        WindowSchedule("random", steps=10, size=3, decay=0.0)
    with pytest.raises(PlanError, match=r"window_size 11"):
        WindowSchedule("random", steps=10, size=11)
