"""The objective: first ratio, gradient, batching, clipping, KL divergence and GRPO-Guard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from treegrpo.advantage import backup, leaf_advantages
from treegrpo.objective import (
    Loss,
    clipped_surrogate,
    endpoint_losses,
    gaussian_kl,
    losses,
    node_means,
)
from treegrpo.plan import RolloutPlan, flow_grpo, tree_grpo
from treegrpo.rollout import Rollout, join, rollout
from treegrpo.training.metrics import UpdateMetrics
from treegrpo.transition import (
    Prediction,
    Reduction,
    TransitionKind,
    clean_and_noise,
    flow_schedule,
    transitions,
    variance_preserving_schedule,
)

DIMENSIONS, PROMPTS, STEPS = 3, 3, 5
SCHEDULE = flow_schedule([1 - level / STEPS for level in range(STEPS + 1)])
TREE = tree_grpo(STEPS, branching=3, window_size=2, window_start=1, trees=2)
EXACT = Gaussian(SCHEDULE, torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), 0.5)


class Policy(torch.nn.Module):
    """The exact model plus a small network of the state, the step and the prompt."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(
            0.3 * torch.randn(DIMENSIONS, DIMENSIONS, dtype=dtype, generator=generator)
        )
        self.bias = torch.nn.Parameter(
            0.3 * torch.randn(PROMPTS, STEPS, DIMENSIONS, dtype=dtype, generator=generator)
        )

    def forward(self, x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
        offset = torch.tanh(x @ self.weight + self.bias[prompt_index, step])
        return EXACT(x, step, prompt_index) + offset


def forest_of(
    policy: Policy,
    plan: RolloutPlan = TREE,
    *,
    reduction: Reduction = "mean",
    max_batch: int | None = None,
    keep_means: bool = False,
) -> tuple[Rollout, tuple[Tensor, ...]]:
    """A forest and its edges' advantages, always from the same draws."""
    generator = torch.Generator().manual_seed(7)
    shape = (PROMPTS, plan.roots, DIMENSIONS)
    noise = torch.randn(shape, dtype=policy.weight.dtype, generator=generator)
    forest = rollout(
        policy,
        noise,
        plan,
        SCHEDULE,
        transitions(SCHEDULE, plan.stochastic),
        reduction=reduction,
        max_batch=max_batch,
        keep_means=keep_means,
        generator=generator,
    )
    values = leaf_advantages([forest.leaves.sum(-1)], [1.0])
    return forest, backup(values, [level.log_prob for level in forest.levels], plan).levels


def normal_log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    density: Tensor = Normal(mean, std).log_prob(x)  # type: ignore[no-untyped-call]
    return density


def backward(each_loss: Iterator[Loss], metrics: UpdateMetrics | None = None) -> float:
    """Add the gradient of all parts; returns their sum."""
    total = 0.0
    for loss in each_loss:
        if metrics is not None:
            metrics.add(loss)
        loss.value.backward()  # type: ignore[no-untyped-call]
        total += loss.value.item()
    return total


def gradient(policy: Policy, run: Callable[[], object]) -> Tensor:
    policy.zero_grad()
    run()
    return gradient_of(policy)


def gradient_of(policy: Policy) -> Tensor:
    grads = [parameter.grad for parameter in policy.parameters()]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def moved(policy: Policy, distance: float = 0.02) -> Policy:
    """Another policy near by, so that ratios are not 1 and some are clipped."""
    other = Policy(policy.weight.dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.add_(distance * noise)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_first_update_has_ratio_one_and_the_plain_policy_gradient(
    dtype: torch.dtype, reduction: Reduction
) -> None:
    policy = Policy(dtype)
    forest, advantages = forest_of(policy, reduction=reduction)
    metrics = UpdateMetrics()

    def clipped() -> None:
        backward(losses(policy, forest, advantages), metrics)

    def plain() -> None:
        total = torch.zeros((), dtype=dtype)
        for level, advantage in zip(forest.levels, advantages, strict=True):
            parents = level.nodes.repeat_interleave(TREE.branching[level.step], 1).flatten(0, 1)
            index = torch.arange(PROMPTS).repeat_interleave(len(parents) // PROMPTS)
            output = policy(parents, level.step, index)
            clean, noise = clean_and_noise(output, parents, SCHEDULE, level.step)
            mean = level.transition.mean(clean, noise)
            density = normal_log_prob(level.children.flatten(0, 1), mean, level.transition.std)
            scores = density.mean(1) if reduction == "mean" else density.sum(1)
            total = total - (advantage.flatten() * scores).sum()
        (total / (PROMPTS * TREE.edges)).backward()  # type: ignore[no-untyped-call]

    actual, expected = gradient(policy, clipped), gradient(policy, plain)
    record = metrics.record()
    assert record["ratio_error"] < 1e-6
    assert record["ratio_min"] == pytest.approx(1.0, abs=1e-6)
    assert record["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    assert record["clip_fraction"] == 0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert expected.abs().max() > 1e-3
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("micro_batch", [1, 4, 7, 1000])
def test_micro_batches_do_not_change_the_summed_gradient(micro_batch: int) -> None:
    behavior = Policy()
    forest, advantages = forest_of(behavior, keep_means=True)
    policy = moved(behavior)

    def run(size: int | None, metrics: UpdateMetrics) -> Callable[[], None]:
        def all_parts() -> None:
            parts = losses(
                policy,
                forest,
                advantages,
                clip_low=0.002,
                clip_high=0.003,
                micro_batch=size,
                kl_weight=0.1,
                reference=node_means(behavior, forest, torch.device("cpu"), size),
                guard=True,
            )
            backward(parts, metrics)

        return all_parts

    whole, parts = UpdateMetrics(), UpdateMetrics()
    expected = gradient(policy, run(None, whole))
    actual = gradient(policy, run(micro_batch, parts))
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()
    # The step is such that the clip acts on some edges and not on others.
    assert 0 < whole.record()["clip_fraction"] < 1
    assert parts.record() == pytest.approx(whole.record(), rel=1e-10)


@pytest.mark.parametrize("max_batch", [1, 5, 1000])
def test_model_batches_do_not_change_the_rollout(max_batch: int) -> None:
    whole, _ = forest_of(Policy())
    parts, _ = forest_of(Policy(), max_batch=max_batch)
    assert parts.forwards == whole.forwards
    torch.testing.assert_close(parts.leaves, whole.leaves, rtol=1e-12, atol=1e-12)
    for one, other in zip(parts.levels, whole.levels, strict=True):
        torch.testing.assert_close(one.children, other.children, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.log_prob, other.log_prob, rtol=1e-12, atol=1e-12)


def test_a_prompts_samples_do_not_depend_on_its_batch() -> None:
    """With a generator each, prompts can be sampled apart and joined."""
    policy = Policy()
    noise = torch.randn(PROMPTS, TREE.roots, DIMENSIONS, dtype=policy.weight.dtype)

    def sample(prompts: list[int]) -> Rollout:
        def predict(x: Tensor, step: int, index: Tensor) -> Tensor:
            output: Tensor = policy(x, step, torch.tensor(prompts)[index])
            return output

        steps = transitions(SCHEDULE, TREE.stochastic)
        generators = [torch.Generator().manual_seed(prompt) for prompt in prompts]
        return rollout(
            predict, noise[prompts], TREE, SCHEDULE, steps, generator=generators, keep_means=True
        )

    whole = sample(list(range(PROMPTS)))
    joined = join([sample([0]), sample(list(range(1, PROMPTS)))])
    assert joined.forwards == whole.forwards
    torch.testing.assert_close(joined.leaves, whole.leaves, rtol=1e-12, atol=1e-12)
    for one, other in zip(joined.levels, whole.levels, strict=True):
        for name in ("nodes", "children", "log_prob", "mean"):
            torch.testing.assert_close(
                getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_torchs(reduction: Reduction) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, reference = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=generator)
    exact = kl_divergence(Normal(mean, 0.3), Normal(reference, 0.3)).flatten(1)
    expected = exact.mean(1) if reduction == "mean" else exact.sum(1)
    torch.testing.assert_close(gaussian_kl(mean, reference, 0.3, reduction), expected)


def test_kl_to_the_reference_is_averaged_over_edges_and_weighted() -> None:
    behavior = Policy()
    forest, advantages = forest_of(behavior)
    reference, metrics = moved(behavior, 0.5), UpdateMetrics()
    without = backward(losses(behavior, forest, advantages))
    with_kl = backward(
        losses(
            behavior,
            forest,
            advantages,
            kl_weight=0.5,
            reference=node_means(reference, forest, torch.device("cpu"), 4),
        ),
        metrics,
    )
    total = 0.0
    for level in forest.levels:
        rows = level.nodes.flatten(0, 1)
        index = torch.arange(PROMPTS).repeat_interleave(level.nodes.shape[1])
        means = [
            level.transition.mean(
                *clean_and_noise(model(rows, level.step, index), rows, SCHEDULE, level.step)
            )
            for model in (behavior, reference)
        ]
        std = level.transition.std
        divergence = kl_divergence(Normal(means[0], std), Normal(means[1], std)).mean(1)
        total += level.branching * divergence.sum().item()
    expected = total / (PROMPTS * TREE.edges)
    assert metrics.record()["kl"] == pytest.approx(expected, rel=1e-10)
    assert with_kl - without == pytest.approx(0.5 * expected, rel=1e-10)
    with pytest.raises(ValueError, match=r"kl_weight: got 0\.5 without a reference"):
        next(losses(behavior, forest, advantages, kl_weight=0.5))


def test_clipping_by_hand() -> None:
    ratio = torch.tensor([0.5, 0.95, 1.0, 1.1, 2.0] * 2, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([3.0] * 5 + [-3.0] * 5, dtype=torch.float64)
    loss, clipped = clipped_surrogate(ratio, advantage, clip_low=0.1, clip_high=0.2)
    expected = [-1.5, -2.85, -3.0, -3.3, -3.6, 2.7, 2.85, 3.0, 3.3, 6.0]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    # Only where the clip lowers the objective: too likely a good edge, too unlikely a bad one.
    assert clipped.nonzero().flatten().tolist() == [4, 5]
    (slope,) = torch.autograd.grad(loss.sum(), ratio)
    assert slope.tolist() == pytest.approx([-3, -3, -3, -3, 0, 0, 3, 3, 3, 3])


def test_guard_by_hand() -> None:
    """`ratio = exp((difference of log-probs + mean|dmu|^2 / (2 std^2)) * std)`, loss over -dt."""
    behavior = Policy()
    plan = RolloutPlan(1, (1, 2, 1, 1, 1), (False, True, False, False, False))
    forest, _ = forest_of(behavior, plan, keep_means=True)
    policy = moved(behavior, 0.1)
    (level,) = forest.levels
    advantage = torch.tensor([[1.0, -2.0], [0.5, 1.0], [-1.0, 3.0]], dtype=torch.float64)

    std, dt = level.transition.std, SCHEDULE.sigma[2] - SCHEDULE.sigma[1]
    total = 0.0
    ratios = []
    for prompt in range(PROMPTS):
        node = level.nodes[prompt]
        velocity = policy(node, 1, torch.tensor([prompt]))
        clean, noise = clean_and_noise(velocity, node, SCHEDULE, 1)
        new = level.transition.mean(clean, noise)[0]
        assert level.mean is not None
        old = level.mean[prompt, 0]
        drift = ((new - old) ** 2).mean() / (2 * std**2)
        for child in range(2):
            x = level.children[prompt, child]
            difference = (normal_log_prob(x, new, std) - normal_log_prob(x, old, std)).mean()
            ratios.append(math.exp((difference + drift).item() * std))
            total += -ratios[-1] * float(advantage[prompt, child]) / -dt / 6

    metrics = UpdateMetrics()
    parts = losses(policy, forest, [advantage], clip_low=10.0, clip_high=10.0, guard=True)
    assert backward(parts, metrics) == pytest.approx(total, rel=1e-10)
    record = metrics.record()
    assert record["ratio_mean"] == pytest.approx(sum(ratios) / 6, rel=1e-10)
    assert record["ratio_error"] == pytest.approx(max(abs(r - 1) for r in ratios), rel=1e-10)

    bare, _ = forest_of(behavior, plan)
    with pytest.raises(ValueError, match="the rollout was made without keep_means"):
        next(losses(policy, bare, [advantage], guard=True))


def test_slices_of_prompts_add_up_to_the_whole() -> None:
    """Each slice averages over its own edges, so it counts by its share of the prompts."""
    behavior = Policy()
    forest, advantages = forest_of(behavior)
    policy = moved(behavior)

    def run(parts: list[slice], metrics: UpdateMetrics) -> Callable[[], None]:
        def all_parts() -> None:
            for part in parts:
                share = len(range(*part.indices(PROMPTS))) / PROMPTS
                for loss in losses(
                    policy,
                    forest,
                    advantages,
                    clip_low=0.05,
                    clip_high=0.05,
                    prompts=part,
                    micro_batch=5,
                ):
                    metrics.add(loss)
                    (share * loss.value).backward()  # type: ignore[no-untyped-call]

        return all_parts

    whole, sliced = UpdateMetrics(), UpdateMetrics()
    expected = gradient(policy, run([slice(None)], whole))
    actual = gradient(policy, run([slice(0, 1), slice(1, 10)], sliced))
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert sliced.forwards == whole.forwards
    # The mean over all edges, whatever parts they came in.
    assert sliced.record()["ratio_mean"] == pytest.approx(whole.record()["ratio_mean"], rel=1e-12)


def test_statistics_of_two_ranks_merge() -> None:
    behavior = Policy()
    forest, advantages = forest_of(behavior)
    policy = moved(behavior)
    whole, first, second = (UpdateMetrics() for _ in range(3))
    for part, metrics in ((slice(None), whole), (slice(0, 2), first), (slice(2, 3), second)):
        backward(losses(policy, forest, advantages, prompts=part), metrics)
    first.merge(second)
    assert first.forwards == whole.forwards
    merged, expected = first.record(), whole.record()
    del merged["loss"], expected["loss"]  # each averages over its own edges
    assert merged == pytest.approx(expected, rel=1e-10)


def test_a_flat_plan_is_plain_grpo() -> None:
    """Against GRPO written for trajectories, with no forest anywhere."""
    behavior, group = Policy(), 4
    plan = flow_grpo(STEPS, group_size=group)
    forest, advantages = forest_of(behavior, plan)
    policy = moved(behavior)
    low, high = 0.01, 0.02

    def forest_loss() -> None:
        backward(losses(policy, forest, advantages, clip_low=low, clip_high=high))

    plain_value = 0.0

    def plain() -> None:
        nonlocal plain_value
        path = [level.nodes for level in forest.levels] + [forest.leaves]
        rewards = path[-1].sum(-1)
        spread = rewards.std(1, correction=0, keepdim=True) + 1e-6
        advantage = (rewards - rewards.mean(1, keepdim=True)) / spread
        total = torch.zeros((), dtype=torch.float64)
        for prompt in range(PROMPTS):
            for sample in range(group):
                for step in range(STEPS):
                    x, following = path[step][prompt, sample], path[step + 1][prompt, sample]
                    sigma, dt = (
                        SCHEDULE.sigma[step],
                        SCHEDULE.sigma[step + 1] - SCHEDULE.sigma[step],
                    )
                    g = 0.7 * math.sqrt(sigma / (1 - (SCHEDULE.sigma[1] if step == 0 else sigma)))
                    densities = []
                    for model in (policy, behavior):
                        v = model(x[None], step, torch.tensor([prompt]))[0]
                        mean = x + (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
                        densities.append(
                            normal_log_prob(following, mean, g * math.sqrt(-dt)).mean()
                        )
                    ratio = (densities[0] - densities[1].detach()).exp()
                    a = advantage[prompt, sample]
                    total = total + torch.max(-ratio * a, -ratio.clamp(1 - low, 1 + high) * a)
        objective = total / (PROMPTS * group * STEPS)
        plain_value = objective.item()
        objective.backward()  # type: ignore[no-untyped-call]

    actual, expected = gradient(policy, forest_loss), gradient(policy, plain)
    value = sum(
        loss.value.item()
        for loss in losses(policy, forest, advantages, clip_low=low, clip_high=high)
    )
    # Advantages are float32, everything else float64.
    assert value == pytest.approx(plain_value, rel=1e-5, abs=1e-7)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


# --- the endpoint objective ---


def endpoint_by_hand(policy: Policy, forest: Rollout, advantages: tuple[Tensor, ...]) -> Tensor:
    """Edge by edge, from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for level, advantage in zip(forest.levels, advantages, strict=True):
        nodes, siblings = level.nodes.shape[1], level.branching
        below = forest.plan.leaves // (nodes * siblings)
        for prompt in range(PROMPTS):
            for node in range(nodes):
                x = level.nodes[prompt, node : node + 1]
                (output,) = policy(x, level.step, torch.tensor([prompt]))
                edges = range(node * siblings, (node + 1) * siblings)
                ends = [forest.leaves[prompt, e * below : (e + 1) * below].mean(0) for e in edges]
                values = [advantage[prompt, e].item() for e in edges]
                for end, value in zip(ends, values, strict=True):
                    away = end - sum(ends) / siblings
                    size = math.sqrt(away.square().mean().item() + 1e-6)
                    local = value - sum(values) / siblings
                    total = total + local * (away / size * output).mean()
    return total / (PROMPTS * forest.plan.edges)


def test_the_endpoint_objective_by_hand_in_any_micro_batches() -> None:
    policy = Policy()
    forest, advantages = forest_of(policy)
    values: list[float] = []

    def by_hand() -> None:
        value = endpoint_by_hand(policy, forest, advantages)
        value.backward()  # type: ignore[no-untyped-call]
        values.append(value.item())

    expected = gradient(policy, by_hand)
    assert expected.abs().max() > 1e-3
    for micro_batch in (None, 1, 5):
        metrics = UpdateMetrics()
        parts = endpoint_losses(policy, forest, advantages, micro_batch=micro_batch)
        policy.zero_grad()
        values.append(backward(parts, metrics))
        actual = gradient_of(policy)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        assert values[-1] == pytest.approx(values[0], rel=1e-9)
        assert metrics.forwards == PROMPTS * TREE.update_forwards
        assert metrics.record()["ratio_error"] < 1e-12


def test_the_endpoint_objective_knows_differences_between_siblings_only() -> None:
    """What siblings share, in value or in their endpoints, teaches nothing."""
    policy = Policy()
    forest, advantages = forest_of(policy)
    first = gradient(policy, lambda: backward(endpoint_losses(policy, forest, advantages)))
    shifted = tuple(
        edges + torch.randn(*edges.shape[:1], edges.shape[1] // 3, 1).expand(-1, -1, 3).flatten(1)
        for edges in advantages
    )
    again = gradient(policy, lambda: backward(endpoint_losses(policy, forest, shifted)))
    torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-7)
    same_ends = replace(forest, leaves=forest.leaves[:, :1].expand_as(forest.leaves))
    nothing = gradient(policy, lambda: backward(endpoint_losses(policy, same_ends, advantages)))
    assert nothing.abs().max() < 1e-12  # the mean of equal numbers is rounded
    flat, edges = forest_of(policy, flow_grpo(STEPS, group_size=4))
    nothing = gradient(policy, lambda: backward(endpoint_losses(policy, flat, edges)))
    assert nothing.abs().max() < 1e-12


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v_prediction", "sample"])
def test_the_clean_estimate_moves_towards_the_better_child(prediction: Prediction) -> None:
    """Whatever the model's output is: one step down the gradient, and the estimate is nearer."""
    alphas = [0.01, 0.2, 0.5, 0.8, 0.95, 1.0]
    schedule = (
        SCHEDULE if prediction == "velocity" else variance_preserving_schedule(alphas, prediction)
    )
    kind: TransitionKind = "flow_sde" if prediction == "velocity" else "ddim"
    plan = tree_grpo(STEPS, branching=2, window_size=1, window_start=1)
    output = torch.zeros(1, DIMENSIONS, dtype=torch.float64, requires_grad=True)

    def predict(x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
        return output + 0.2 * x

    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1, 1, DIMENSIONS, dtype=torch.float64, generator=generator)
    steps = transitions(schedule, plan.stochastic, kind)
    forest = rollout(predict, noise, plan, schedule, steps, generator=generator)
    worse, better = forest.leaves[0]
    backward(endpoint_losses(predict, forest, [torch.tensor([[-1.0, 1.0]])]))
    (level,) = forest.levels
    x = level.nodes[0]
    clean, _ = clean_and_noise(output.detach() + 0.2 * x, x, schedule, level.step)
    assert output.grad is not None
    moved, _ = clean_and_noise(output.detach() - output.grad + 0.2 * x, x, schedule, level.step)
    step, way = (moved - clean)[0], better - worse
    assert torch.cosine_similarity(step, way, dim=0) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("objective", [losses, endpoint_losses])
def test_a_trust_region_leaves_out_what_has_moved_far_and_is_favoured(
    objective: Callable[..., Iterator[Loss]],
) -> None:
    """Node by node against the definition: |mean - old mean|^2 / (2 std^2) per dimension, and
    whether the child is likelier (or the mean nearer to where it ends) than when it was sampled."""
    behavior = Policy()
    plan = tree_grpo(STEPS, branching=3, window_size=1, window_start=1)
    forest, (advantage,) = forest_of(behavior, plan, keep_means=True)
    policy = moved(behavior, 0.1)
    (level,) = forest.levels
    index = torch.arange(PROMPTS)
    nodes, std = level.nodes.flatten(0, 1), level.transition.std
    with torch.no_grad():
        new = level.transition.mean(
            *clean_and_noise(policy(nodes, level.step, index), nodes, SCHEDULE, level.step)
        )
    assert level.mean is not None
    shift = new - level.mean.flatten(0, 1)
    distances = shift.square().mean(1) / (2 * std**2)
    middle = distances.median().item()
    if objective is losses:
        old = level.mean.flatten(0, 1)[:, None]
        nearer = (level.children - new[:, None]).square().sum(-1) < (
            level.children - old
        ).square().sum(-1)
        favoured = (advantage > 0) == nearer
    else:
        ends = forest.leaves - forest.leaves.mean(1, keepdim=True)
        local = advantage - advantage.mean(1, keepdim=True)
        favoured = local * torch.einsum("nkd,nd->nk", ends, shift) > 0
    left_out = favoured & (distances >= middle)[:, None]
    assert 0 < left_out.sum() < favoured.sum() < left_out.numel()

    # One edge at a time: its gradient is there, or not.
    for prompt in range(PROMPTS):
        for child in range(3):
            one = torch.zeros_like(advantage)
            one[prompt, child] = advantage[prompt, child]
            if objective is losses:
                policy.zero_grad()
                backward(objective(policy, forest, [one], max_divergence=middle))
                grown = gradient_of(policy)
                assert (grown.abs().max() == 0) == bool(left_out[prompt, child])
    metrics = UpdateMetrics()
    backward(objective(policy, forest, [advantage], max_divergence=middle), metrics)
    assert metrics.record()["clip_fraction"] == pytest.approx(left_out.double().mean().item())

    bare, _ = forest_of(behavior, plan)
    with pytest.raises(ValueError, match="max_divergence: the rollout was made without keep_means"):
        next(objective(policy, bare, [advantage], max_divergence=1.0))
