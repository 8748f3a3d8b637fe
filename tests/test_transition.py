"""Transitions against the published forms, against diffusers, and against an exact Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from gaussian import Gaussian, moments
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import Normal

from treegrpo.plan import PlanError, RolloutPlan, tree_grpo
from treegrpo.rollout import rollout
from treegrpo.transition import (
    Prediction,
    Reduction,
    Schedule,
    Transition,
    TransitionKind,
    clean_and_noise,
    flow_schedule,
    log_prob,
    multistep,
    ode,
    stochastic,
    transitions,
    variance_preserving_schedule,
)

# Uneven, as Stable Diffusion 3's shift of 3 makes them.
FLOW = flow_schedule([3 * t / (1 + 2 * t) for t in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)])


def cosine_schedule(steps: int, prediction: Prediction = "epsilon") -> Schedule:
    """The cosine noise schedule from nearly all noise to none."""
    angles = [0.49 * math.pi * (1 - level / steps) for level in range(steps + 1)]
    return variance_preserving_schedule([math.cos(angle) ** 2 for angle in angles], prediction)


def states(*shape: int) -> tuple[Tensor, Tensor]:
    """A float64 state and a model output of a shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    return x, torch.randn(shape, dtype=torch.float64, generator=generator)


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", range(5))
def test_flow_sde_is_flow_grpos_published_form(step: int) -> None:
    x, v = states(4, 3)
    sigma, following = FLOW.sigma[step], FLOW.sigma[step + 1]
    dt, eta = following - sigma, 0.7
    g = eta * math.sqrt(sigma / (1 - (FLOW.sigma[1] if sigma == 1 else sigma)))
    published = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt

    transition = stochastic(FLOW, step, "flow_sde", eta)
    assert close(transition.mean(*clean_and_noise(v, x, FLOW, step)), published)
    assert transition.std == pytest.approx(g * math.sqrt(-dt), rel=1e-12)


@pytest.mark.parametrize("step", range(5))
def test_dance_sde_is_dance_grpos_published_form(step: int) -> None:
    x, v = states(4, 3)
    sigma, following = FLOW.sigma[step], FLOW.sigma[step + 1]
    dt, eta = following - sigma, 0.3
    x0 = x - sigma * v
    score = -(x - x0 * (1 - sigma)) / sigma**2
    published = x + dt * v - 0.5 * eta**2 * score * dt

    transition = stochastic(FLOW, step, "dance_sde", eta)
    assert close(transition.mean(*clean_and_noise(v, x, FLOW, step)), published)
    assert transition.std == pytest.approx(eta * math.sqrt(-dt), rel=1e-12)


@pytest.mark.parametrize("step", range(4))
def test_cps_is_its_published_form(step: int) -> None:
    x, v = states(4, 3)
    sigma, following = FLOW.sigma[step], FLOW.sigma[step + 1]
    std = following * math.sin(0.7 * math.pi / 2)
    x0, x1 = x - v * sigma, x + v * (1 - sigma)
    published = x0 * (1 - following) + x1 * math.sqrt(following**2 - std**2)

    transition = stochastic(FLOW, step, "cps", 0.7)
    assert close(transition.mean(*clean_and_noise(v, x, FLOW, step)), published)
    assert transition.std == pytest.approx(std, rel=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_diffusers(prediction: Prediction, eta: float) -> None:
    """Mean and standard deviation, through the noise that diffusers lets one pass in."""
    # Stable Diffusion's settings, under which the last level still holds a little noise.
    reference = DDIMScheduler(
        prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    # Its float32 levels lose 1 - alpha / alpha' to cancellation; in float64 the two agree closely.
    reference.alphas_cumprod = reference.alphas_cumprod.double()
    reference.final_alpha_cumprod = reference.final_alpha_cumprod.double()
    reference.set_timesteps(8)
    kept = reference.alphas_cumprod[reference.timesteps].tolist()
    schedule = variance_preserving_schedule(
        [*kept, float(reference.final_alpha_cumprod)], prediction
    )
    x, output = states(1, 3, 4, 4)
    for step, timestep in enumerate(reference.timesteps):

        def published(noise: Tensor, timestep: Tensor = timestep) -> Tensor:
            result: Tensor = reference.step(
                output, timestep, x, eta=eta, variance_noise=noise, return_dict=False
            )[0]
            return result

        expected = published(torch.zeros_like(x))
        if eta == 0:
            transition = ode(schedule, step)
        else:
            transition = stochastic(schedule, step, "ddim", eta)
            std = (published(torch.ones_like(x)) - expected).mean().item()
            assert transition.std == pytest.approx(std, rel=1e-9)
        mean = transition.mean(*clean_and_noise(output, x, schedule, step))
        assert (mean - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_ode_is_the_euler_step_of_diffusers() -> None:
    reference = FlowMatchEulerDiscreteScheduler(shift=3.0)
    reference.set_timesteps(7)
    schedule = flow_schedule(reference.sigmas.tolist())
    x, v = (tensor.float() for tensor in states(2, 3, 4, 4))
    for step, timestep in enumerate(reference.timesteps):
        expected = reference.step(v, timestep, x, return_dict=False)[0]
        actual = ode(schedule, step).mean(*clean_and_noise(v, x, schedule, step))
        # A few roundings of numbers up to the state's largest.
        assert (actual - expected).abs().max() <= 1e-6 * x.abs().max()


@pytest.mark.parametrize(
    ("schedule", "kind", "noise_level"),
    [
        (FLOW, None, 0.0),
        (FLOW, "flow_sde", 0.7),
        (FLOW, "dance_sde", 0.7),
        (FLOW, "cps", 0.7),
        (cosine_schedule(5), None, 0.0),
        (cosine_schedule(5), "ddim", 1.0),
        (cosine_schedule(5), "cps", 0.7),
        (cosine_schedule(5, "v_prediction"), "ddim", 0.5),
        (cosine_schedule(5, "sample"), "ddim", 0.5),
    ],
)
def test_sampled_moments_are_the_exact_ones_at_every_level(
    schedule: Schedule, kind: TransitionKind | None, noise_level: float
) -> None:
    """Within 5 standard errors: of the mean, and of a Gaussian's sample variance."""
    samples, dimensions = 20_000, 2
    gaussian = Gaussian(schedule, torch.tensor([1.5, -0.5], dtype=torch.float64), 0.5)
    # cps and ddim add no noise on the way to sigma = 0.
    last = kind in ("flow_sde", "dance_sde")
    sampled = (kind is not None,) * 4 + (last,)
    steps = transitions(schedule, sampled, kind or "ddim", noise_level)
    levels: list[Tensor] = []

    def predict(x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
        levels.append(x)
        return gaussian(x, step, prompt_index)

    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, samples, dimensions, dtype=torch.float64, generator=generator)
    forest = rollout(
        predict,
        noise,
        RolloutPlan(samples, (1,) * 5, sampled),
        schedule,
        steps,
        generator=generator,
    )
    levels.append(forest.leaves[0])

    exact = moments(gaussian, steps, torch.zeros(dimensions, dtype=torch.float64), 1.0)
    for x, (mean, variance) in zip(levels, exact, strict=True):
        error = (x.mean(0) - mean).abs().max().item()
        assert error <= 5 * math.sqrt(variance / samples)
        assert ((x.var(0) - variance).abs() <= 5 * variance * math.sqrt(2 / samples)).all()


@pytest.mark.parametrize(
    ("family", "kind", "noise_level"),
    [
        ("flow", None, 0.0),
        ("flow", "flow_sde", 0.7),
        ("flow", "dance_sde", 0.7),
        ("flow", "cps", 0.7),
        ("cosine", None, 0.0),
        ("cosine", "ddim", 0.5),
        ("cosine", "ddim", 1.0),
        ("cosine", "cps", 0.7),
    ],
)
def test_transitions_converge_to_the_true_marginals_at_first_order(
    family: str, kind: TransitionKind | None, noise_level: float
) -> None:
    """Four times the steps leave a quarter of the variance's worst error (at most 0.3 of it).

    The mean is exact at any number of steps. Two kinds converge only under a condition:

    - cps adds noise in proportion to the level and not to the step, so its noise level must fall
      with the root of the step; at a constant one it settles on too small a variance.
    - flow_sde starts below sigma = 1, where its coefficient is infinite; see the next test.
    """

    def worst_error(steps: int) -> float:
        top = 0.95 if kind == "flow_sde" else 1.0
        schedule = (
            flow_schedule([top * (1 - level / steps) for level in range(steps + 1)])
            if family == "flow"
            else cosine_schedule(steps)
        )
        level_now = noise_level * math.sqrt(8 / steps) if kind == "cps" else noise_level
        last = kind in ("flow_sde", "dance_sde")
        flags = [kind is not None] * (steps - 1) + [last]
        gaussian = Gaussian(schedule, torch.ones(1, dtype=torch.float64), 0.5)
        exact = moments(
            gaussian,
            transitions(schedule, flags, kind or "ddim", level_now),
            *gaussian.marginal(0),
        )
        true = [gaussian.marginal(level) for level in range(steps + 1)]
        for (mean, _), (true_mean, _) in zip(exact, true, strict=True):
            assert close(mean, true_mean)
        return max(abs(a - b) for (_, a), (_, b) in zip(exact, true, strict=True))

    few, many = worst_error(128), worst_error(512)
    assert 0.2 * few < many < 0.3 * few


def test_flow_sde_from_pure_noise_overshoots_by_a_known_amount() -> None:
    """Its first step adds variance eta^2 however short it is, and takes eta^2 / 2 off the noise:
    (1 - eta^2 / 2)^2 + eta^2 = 1 + eta^4 / 4."""
    steps, eta = 10_000, 0.7
    schedule = flow_schedule([1 - level / steps for level in range(steps + 1)])
    gaussian = Gaussian(schedule, torch.ones(1, dtype=torch.float64), 0.5)
    first = stochastic(schedule, 0, "flow_sde", eta)
    (_, variance) = moments(gaussian, [first], *gaussian.marginal(0))[1]
    assert variance - gaussian.marginal(1)[1] == pytest.approx(eta**4 / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [(FLOW, None), (FLOW, "cps"), (cosine_schedule(5), "cps"), (cosine_schedule(5), "ddim")],
)
def test_a_point_mass_is_sampled_exactly_at_any_number_of_steps(
    schedule: Schedule, kind: TransitionKind | None
) -> None:
    gaussian = Gaussian(schedule, torch.ones(1, dtype=torch.float64), 0.0)
    flags = [kind is not None] * 4 + [False]
    steps = transitions(schedule, flags, kind or "ddim", 0.7)
    for level, (mean, variance) in enumerate(moments(gaussian, steps, *gaussian.marginal(0))):
        assert close(mean, gaussian.marginal(level)[0])
        assert variance == pytest.approx(gaussian.marginal(level)[1], abs=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_is_torchs(reduction: Reduction) -> None:
    x, mean = states(5, 3, 4)
    reference = Normal(mean, 0.3).log_prob(x).flatten(1)  # type: ignore[no-untyped-call]
    expected = reference.mean(1) if reduction == "mean" else reference.sum(1)
    assert torch.allclose(log_prob(x, mean, 0.3, reduction), expected, rtol=1e-13, atol=0)
    single = log_prob(x.bfloat16(), mean.bfloat16(), 0.3, reduction)
    assert single.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_stored_log_probs_are_reproduced_from_the_stored_states(
    dtype: torch.dtype, reduction: Reduction
) -> None:
    """In bfloat16 this needs the state to be rounded before its density is taken."""
    gaussian = Gaussian(FLOW, torch.linspace(-1, 1, 64, dtype=torch.float64), 0.5)
    plan = RolloutPlan(2, (1, 3, 3, 1, 1), (False, True, True, True, False))
    steps = transitions(FLOW, plan.stochastic)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 2, 64, generator=generator).to(dtype)
    forest = rollout(gaussian, noise, plan, FLOW, steps, reduction=reduction, generator=generator)

    assert forest.leaves.dtype == dtype
    for level in forest.levels:
        assert level.nodes.dtype == level.children.dtype == dtype
        nodes = level.nodes.flatten(0, 1)
        output = gaussian(nodes, level.step, torch.zeros(len(nodes), dtype=torch.int64))
        mean = level.transition.mean(*clean_and_noise(output, nodes, FLOW, level.step))
        parents = mean.repeat_interleave(level.branching, 0)
        again = log_prob(level.children.flatten(0, 1), parents, level.transition.std, reduction)
        stored = level.log_prob.flatten()
        assert again.dtype == stored.dtype != torch.bfloat16
        assert torch.equal(again, stored)
        # And it is a float64 density of those very states, up to float32's rounding of a sum
        # whose terms are near 1 each.
        density = Normal(parents.double(), level.transition.std)
        exact = density.log_prob(  # type: ignore[no-untyped-call]
            level.children.flatten(0, 1).double()
        )
        reduced = exact.mean(1) if reduction == "mean" else exact.sum(1)
        size = exact.abs().mean(1) if reduction == "mean" else exact.abs().sum(1)
        assert ((stored - reduced).abs() <= 1e-6 * size).all()


def test_a_step_without_density_is_refused_by_number() -> None:
    for schedule in (FLOW, cosine_schedule(5)):
        with pytest.raises(PlanError, match=r"step 4: a cps transition .* standard deviation 0"):
            transitions(schedule, [True] * 5, "cps")
    with pytest.raises(PlanError, match=r"step 4: a ddim transition .* to 0 at .* deviation 0"):
        transitions(cosine_schedule(5), [True] * 5, "ddim")
    with pytest.raises(PlanError, match=r"step 1: a flow_sde transition .* noise level 0"):
        transitions(FLOW, [False, True, False, False, False], "flow_sde", 0.0)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_a_flow_transition_is_refused_on_a_diffusion_schedule(kind: TransitionKind) -> None:
    with pytest.raises(PlanError, match=f"{kind} is defined for rectified flows"):
        transitions(cosine_schedule(5), [True] + [False] * 4, kind)


def test_more_noise_than_a_level_holds_is_refused() -> None:
    with pytest.raises(PlanError, match=r"noise_level: got 3\.0; ddim needs it in 0\.\.1"):
        stochastic(cosine_schedule(5), 0, "ddim", 3.0)


def test_schedules_are_checked() -> None:
    with pytest.raises(PlanError, match="sigmas must fall strictly"):
        flow_schedule([1.0, 0.5, 0.5, 0.0])
    with pytest.raises(PlanError, match="got 2 alphas and 3 sigmas"):
        Schedule((0.0, 1.0), (1.0, 0.5, 0.0))
    with pytest.raises(PlanError, match="the plan has 4 but the schedule has 5"):
        transitions(FLOW, [True] * 4)


def test_deterministic_transitions_have_no_noise() -> None:
    steps = transitions(FLOW, [True, False, True, False, False], "flow_sde")
    assert [step.std > 0 for step in steps] == [True, False, True, False, False]
    assert steps[1] == Transition(FLOW.alpha[2], FLOW.sigma[2], 0.0)


TAILED = {
    "flow": lambda levels: flow_schedule([3 * t / (1 + 2 * t) for t in levels]),
    "cosine": lambda levels: cosine_schedule(len(levels) - 1),
}


@pytest.mark.parametrize("family", TAILED)
def test_a_skipping_tail_is_of_second_order(family: str) -> None:
    """Against the flow of a Gaussian, which is known: distances from the mean grow as its standard
    deviation does. Twice the steps leave a quarter of the error, but for a factor of log(steps)
    that the end at sigma = 0 adds; a first-order tail leaves half."""
    many = 3072
    schedule = TAILED[family]([1 - level / many for level in range(many + 1)])
    gaussian = Gaussian(schedule, torch.tensor([1.5, -0.5], dtype=torch.float64), 0.5)
    start = many // 8
    (mean, variance), (_, last) = gaussian.marginal(start), gaussian.marginal(many)
    x = torch.tensor([[[0.3, -0.9]]], dtype=torch.float64)
    exact = gaussian.mean + (x - mean) * math.sqrt(last / variance)

    def error(steps: int, *, first_order: bool = False) -> float:
        levels = [start + step * (many - start) // steps for step in range(steps + 1)]
        plan = RolloutPlan(1, (1,) * steps, (False,) * steps, tuple(levels))
        tail = transitions(schedule, plan.stochastic, levels=plan.levels)
        if first_order:
            tail = tuple(ode(schedule, *pair) for pair in pairwise(levels))
        forest = rollout(gaussian, x, plan, schedule, tail)
        assert forest.forwards == steps
        return float((forest.leaves - exact).norm())

    assert 0.2 < error(192) / error(96) < 0.3
    assert 0.45 < error(192, first_order=True) / error(96, first_order=True) < 0.55
    assert error(6) < error(6, first_order=True) / 2


@pytest.mark.parametrize("family", TAILED)
@pytest.mark.parametrize(("before", "level", "after"), [(1, 3, 6), (3, 6, 7), (5, 6, 10)])
def test_multistep_integrates_the_line_through_two_clean_estimates(
    family: str, before: int, level: int, after: int
) -> None:
    """Against numerical quadrature of the exact solution, whose clean estimate is that line."""
    schedule = TAILED[family]([1 - number / 10 for number in range(11)])
    rho = [
        sigma / alpha if alpha else math.inf
        for alpha, sigma in zip(schedule.alpha, schedule.sigma, strict=True)
    ]
    step = multistep(schedule, before, level, after)
    # x' / sigma' = x / sigma + integral of clean(r) / r^2 from rho' to rho; sigma' = 0 is a limit.
    sigma = max(schedule.sigma[after], 1e-9)
    end = sigma / schedule.alpha[after]
    for clean, previous, noise in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.3, -1.2, 0.8)):
        slope = (clean - previous) / (rho[level] - rho[before])
        # In u = 1 / r, so that the integrand stays finite.
        integral, _ = quad(
            lambda u, c=clean, s=slope: c + s * (1 / u - rho[level]),
            1 / rho[level],
            1 / end,
            limit=500,
        )
        x = schedule.alpha[level] * clean + schedule.sigma[level] * noise
        expected = sigma * (x / schedule.sigma[level] + integral)
        actual = step.mean(torch.tensor(clean), torch.tensor(noise), torch.tensor(previous)).item()
        assert actual == pytest.approx(expected, abs=1e-6)
    assert step.std == 0


def test_a_tail_that_skips_nothing_is_the_schedules_own() -> None:
    plan = tree_grpo(5, branching=2, window_size=2, window_start=1)
    own = transitions(FLOW, plan.stochastic, "flow_sde", 0.7)
    same = plan.with_tail(2)
    assert transitions(FLOW, same.stochastic, "flow_sde", 0.7, same.levels) == own
    # Of more steps, all but the first one are of second order.
    long = tree_grpo(5, branching=2, window_size=1).with_tail(2)
    tail = transitions(FLOW, long.stochastic, "flow_sde", 0.7, long.levels)[1:]
    assert tail == (ode(FLOW, 1, 3), multistep(FLOW, 1, 3, 5))
    skipping = plan.with_tail(1)
    # One step has no estimate before it on its own way.
    assert transitions(FLOW, skipping.stochastic, "flow_sde", 0.7, skipping.levels)[3:] == (
        ode(FLOW, 3, 5),
    )
