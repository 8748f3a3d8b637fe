"""One denoising step: noise schedules and the ODE, SDE, CPS and DDIM transitions between levels.

A state is `x = alpha * clean + sigma * noise`. The model's output at x is turned into its estimate
of the pair (clean, noise) once; after that every transition of the family is the same Gaussian

    x' ~ Normal(clean_weight * clean + noise_weight * noise, std^2)

and the transitions differ in three numbers per step. A deterministic step of second order adds a
fourth: the weight of the clean estimate at the step before. Arithmetic is float32 whatever the
model's dtype.

Left out: solvers of third order, and the schedules of checkpoints (`models/`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from treegrpo.plan import PlanError

Prediction = Literal["velocity", "epsilon", "v_prediction", "sample"]
TransitionKind = Literal["flow_sde", "dance_sde", "cps", "ddim"]
Reduction = Literal["mean", "sum"]


# A first sigma above this is 1 but for a scheduler's care not to divide by zero.
_NEARLY_ONE = 0.99


@dataclass(frozen=True)
class Schedule:
    """Noise levels from the first (all or most noise) to the last (none): T + 1 of each.

    Attributes:
        alpha, sigma: the weights of the clean sample and of the noise at each level; sigma falls.
        prediction: what the model's output is.
    """

    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    prediction: Prediction = "velocity"

    def __post_init__(self) -> None:
        if len(self.alpha) != len(self.sigma) or len(self.sigma) < 2:
            raise PlanError(
                f"schedule: got {len(self.alpha)} alphas and {len(self.sigma)} sigmas; both need "
                "one value per level, at least 2"
            )
        if not all(map(math.isfinite, (*self.alpha, *self.sigma))):
            raise PlanError(f"schedule: sigmas must be finite; got {self.sigma}")
        if any(
            later >= earlier for earlier, later in zip(self.sigma, self.sigma[1:], strict=False)
        ):
            raise PlanError(f"schedule: sigmas must fall strictly; got {self.sigma}")
        if self.prediction == "velocity" and not self.is_flow:
            raise PlanError(
                "schedule: a velocity belongs to the rectified flow, alpha = 1 - sigma; for other "
                "schedules the prediction is epsilon, v_prediction or sample"
            )

    @property
    def steps(self) -> int:
        """Denoising steps, T."""
        return len(self.sigma) - 1

    @property
    def is_flow(self) -> bool:
        """Whether this is the rectified flow, `alpha = 1 - sigma`."""
        return all(
            abs(alpha + sigma - 1) < 1e-6
            for alpha, sigma in zip(self.alpha, self.sigma, strict=True)
        )


def flow_schedule(sigmas: Sequence[float]) -> Schedule:
    """The rectified flow's schedule from its sigmas (from 1 down to 0)."""
    return Schedule(tuple(1.0 - float(sigma) for sigma in sigmas), tuple(map(float, sigmas)))


def variance_preserving_schedule(
    alphas_cumprod: Sequence[float], prediction: Prediction = "epsilon"
) -> Schedule:
    """The diffusion schedule `alpha^2 + sigma^2 = 1` from the kept levels' cumulative alphas."""
    alpha = tuple(math.sqrt(float(value)) for value in alphas_cumprod)
    sigma = tuple(math.sqrt(1.0 - float(value)) for value in alphas_cumprod)
    return Schedule(alpha, sigma, prediction)


@dataclass(frozen=True)
class Transition:
    """`x' ~ Normal(clean_weight * clean + noise_weight * noise, std^2)`; std 0: deterministic.

    `previous_weight` is that of the clean estimate one step earlier on the way to x; 0 but for
    `multistep`.
    """

    clean_weight: float
    noise_weight: float
    std: float
    previous_weight: float = 0.0

    def mean(self, clean: Tensor, noise: Tensor, previous: Tensor | None = None) -> Tensor:
        """The mean of x', from the model's estimates at x, and the clean one before it."""
        mean = self.clean_weight * clean + self.noise_weight * noise
        if self.previous_weight == 0:
            return mean
        assert previous is not None
        return mean + self.previous_weight * previous


def ode(schedule: Schedule, step: int, next_level: int | None = None) -> Transition:
    """First-order deterministic step: DDIM with eta 0, the Euler step of the rectified flow.

    Args:
        next_level: where it ends; None: at the schedule's next level.
    """
    end = step + 1 if next_level is None else next_level
    return Transition(schedule.alpha[end], schedule.sigma[end], 0.0)


def multistep(schedule: Schedule, before: int, level: int, after: int) -> Transition:
    """Second-order deterministic step: extrapolates the clean estimate along `rho = sigma / alpha`.

    The exact solution is `x' / sigma' = x / sigma + integral of clean / rho^2 from rho' to rho`.
    With the line through this estimate and the previous one in place of `clean`, the first-order
    step gains `weight * (clean - previous clean)`: rho-AB2 of DEIS (arXiv 2204.13902), on the clean
    estimate. DPM-Solver++(2M) draws its line along log(rho), so that the step into sigma' = 0,
    which weighs most in a tail of few steps, must be of first order there. It need not here.

    Args:
        before, level, after: where the previous step began, where this one begins and ends.
    """
    first_order = ode(schedule, level, after)
    rho_before, rho, rho_after = (
        schedule.sigma[one] / schedule.alpha[one] if schedule.alpha[one] > 0 else math.inf
        for one in (before, level, after)
    )
    # The integral of (rho - x) / x^2 from rho' to rho, times sigma'.
    moment = rho * schedule.alpha[after]
    if rho_after > 0:
        moment -= schedule.sigma[after] * (math.log(rho / rho_after) + 1)
    weight = moment / (rho_before - rho)
    return Transition(
        first_order.clean_weight + weight, first_order.noise_weight, 0.0, previous_weight=-weight
    )


def stochastic(
    schedule: Schedule, step: int, kind: TransitionKind, noise_level: float
) -> Transition:
    """The sampled transition of a step.

    - `flow_sde` (Flow-GRPO, arXiv 2505.05470) and `dance_sde` (DanceGRPO, arXiv 2505.07818):
      `mean = x + (v + s^2 / (2 sigma) * noise) * dt`, `std = s * sqrt(-dt)`, dt = sigma' - sigma;
      s is `noise_level * sqrt(sigma / (1 - sigma))` (where the schedule begins at sigma = 1, or
      just short of it as Wan's and Sana's do, the denominator's sigma is the schedule's second)
      and `noise_level`. Rectified flow only. Substituting
      `v = noise - clean` gives the weights below.
    - `cps` (arXiv 2509.05952): `std = sigma' * sin(noise_level * pi / 2)`.
    - `ddim` (arXiv 2010.02502, eta = noise_level):
      `std = eta * sigma' / sigma * sqrt(1 - alpha^2 / alpha'^2)`.
      For both, the noise's weight is what keeps the level's total: `sqrt(sigma'^2 - std^2)`.

    Raises:
        PlanError: the transition has no density (std 0), or needs a rectified flow.
    """
    alpha, sigma = schedule.alpha[step], schedule.sigma[step]
    next_alpha, next_sigma = schedule.alpha[step + 1], schedule.sigma[step + 1]
    if kind in ("flow_sde", "dance_sde"):
        if not schedule.is_flow:
            raise PlanError(
                f"transition: {kind} is defined for rectified flows (alpha = 1 - sigma) only; for "
                "this schedule use ddim or cps"
            )
        time_step = next_sigma - sigma
        scale = noise_level
        if kind == "flow_sde":
            bounded = schedule.sigma[1] if step == 0 and sigma > _NEARLY_ONE else sigma
            scale = noise_level * math.sqrt(sigma / (1 - bounded))
        std = scale * math.sqrt(-time_step)
        noise_weight = next_sigma + scale**2 / (2 * sigma) * time_step
    else:
        if not 0 <= noise_level <= 1:
            raise PlanError(
                f"noise_level: got {noise_level}; {kind} needs it in 0..1, or a step would add "
                "more noise than its next level holds"
            )
        if kind == "cps":
            std = next_sigma * math.sin(noise_level * math.pi / 2)
        else:
            std = noise_level * next_sigma / sigma * math.sqrt(1 - (alpha / next_alpha) ** 2)
        noise_weight = math.sqrt(max(next_sigma**2 - std**2, 0.0))
    if std <= 0:
        raise PlanError(
            f"step {step}: a {kind} transition from sigma {sigma:.4g} to {next_sigma:.4g} at "
            f"noise level {noise_level} has standard deviation 0, so it has no density and cannot "
            "be trained; make the step deterministic (for the flat methods: "
            "deterministic_final_step) or move the window"
        )
    return Transition(next_alpha, noise_weight, std)


def transitions(
    schedule: Schedule,
    stochastic_steps: Sequence[bool],
    kind: TransitionKind = "flow_sde",
    noise_level: float = 0.7,
    levels: Sequence[int] | None = None,
) -> tuple[Transition, ...]:
    """Every step's transition for a plan's `stochastic` flags.

    Args:
        levels: the plan's, where it does not take every level of the schedule. Its steps after the
            last stochastic one are then of second order, but for the first of them: what the model
            estimated before a draw says little about the way from it.

    Raises:
        PlanError: as `stochastic`, or the schedule and the plan differ in their number of steps.
    """
    levels = range(len(stochastic_steps) + 1) if levels is None else levels
    if schedule.steps != levels[-1] or len(levels) != len(stochastic_steps) + 1:
        raise PlanError(f"steps: the plan has {levels[-1]} but the schedule has {schedule.steps}")
    tail = max((step for step, flag in enumerate(stochastic_steps) if flag), default=-1) + 1
    skips = levels[-1] - levels[tail] > len(stochastic_steps) - tail
    steps = []
    for step, sampled in enumerate(stochastic_steps):
        if sampled:
            steps.append(stochastic(schedule, levels[step], kind, noise_level))
        elif skips and step > tail:
            steps.append(multistep(schedule, *levels[step - 1 : step + 2]))
        else:
            steps.append(ode(schedule, levels[step], levels[step + 1]))
    return tuple(steps)


def clean_and_noise(
    output: Tensor, x: Tensor, schedule: Schedule, step: int
) -> tuple[Tensor, Tensor]:
    """The model's estimates of the clean sample and of the noise in x, in float32 (or float64).

    Args:
        output, x: [rows, ...]; the model's output at x, which stands at level `step`.
    """
    output, x = _at_least_float32(output), _at_least_float32(x)
    alpha, sigma = schedule.alpha[step], schedule.sigma[step]
    match schedule.prediction:
        case "velocity":
            return x - sigma * output, x + (1 - sigma) * output
        case "epsilon":
            return (x - sigma * output) / alpha, output
        case "v_prediction":
            return alpha * x - sigma * output, sigma * x + alpha * output
        case "sample":
            return output, (x - alpha * output) / sigma


def log_prob(x: Tensor, mean: Tensor, std: float, reduction: Reduction = "mean") -> Tensor:
    """Log-density of x under Normal(mean, std^2), float32.

    Args:
        x, mean: [rows, ...] (or broadcastable, with the rows' dimensions leading).
        reduction: `mean` over each row's dimensions, as all published code does, or `sum`, the
            exact density.

    Returns:
        One number per row: reduced over every dimension but the first.
    """
    deviation = (_at_least_float32(x) - mean) / std
    density = -0.5 * deviation.square() - (math.log(std) + 0.5 * math.log(2 * math.pi))
    flat = density.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
