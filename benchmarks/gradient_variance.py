"""How noisy is the policy gradient of a tree, against flat groups, for the same model forwards?

The model is exact (tests/gaussian.py), so the true gradient is known and nothing is learned or
downloaded. T = 10, 27 leaves, three stochastic steps starting at `window_start`:

    flat          27 independent trajectories (MixGRPO)
    flat shared   27 trajectories parting at the window's first step, with one noise and prefix
    tree          3 x 3 x 3 leaves (TreeGRPO), with each backup

`flat shared` tells what sharing one noise does from what branching does.

The measure is forwards for a given accuracy. An estimate g from one group has noise-to-signal
`tr Var(g) / |E g|^2`; averaging groups divides it by their number, so `noise-to-signal * forwards
per group` is the number of forwards at which it is 1, whatever a group's size: lower is better.
It is taken of the gradient with respect to one shift of the velocity at all stochastic steps:

- `even`: each step's part divided by its known factor (`expected_factors`), so that every method
  estimates the same thing, the exact gradient. This is the comparison to quote. `scale` is the
  estimate's mean against the exact gradient: 1, unless the backup is biased (`logprob` may be).
- `as trained`: the parts as the objective adds them. A tree has 3, 9 and 27 edges on its steps, and
  the mean over edges counts its last step most, which is also its least noisy. The exact
  gradients of the steps are parallel here, so that this costs no direction; in a real model they
  are not, and the two kinds differ in what they aim at, not only in noise.
- `steps`: each stochastic step by itself, which no factor can change.

A forward in the update counts three (it has a backward).

Left out: normalisation by the group's standard deviation, clipping, and everything about real
models and rewards.

    PYTHONPATH=src python benchmarks/gradient_variance.py [--quick]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from gaussian import (
    Gaussian,
    exact_gradients,
    expected_factors,
    linear_reward,
    policy_gradients,
    quadratic_reward,
    threshold_reward,
)

from treegrpo.advantage import Backup
from treegrpo.plan import RolloutPlan, mix_grpo, tree_grpo
from treegrpo.transition import flow_schedule, transitions

STEPS, WINDOW, BRANCHING, DIMENSIONS = 10, 3, 3, 4
BACKWARD_COST = 3
PARTS = 10


def methods(start: int) -> dict[str, tuple[RolloutPlan, Backup]]:
    tree = tree_grpo(STEPS, branching=BRANCHING, window_size=WINDOW, window_start=start)
    flat = mix_grpo(STEPS, group_size=tree.leaves, window_size=WINDOW, window_start=start)
    parting = tuple(tree.leaves if step == start else 1 for step in range(STEPS))
    return {
        "flat": (flat, "uniform"),
        "flat shared": (RolloutPlan(1, parting, tree.stochastic), "uniform"),
        "tree uniform": (tree, "uniform"),
        "tree logprob": (tree, "logprob"),
        "tree sibling": (tree, "sibling"),
    }


def forwards(plan: RolloutPlan) -> int:
    return plan.rollout_forwards + BACKWARD_COST * plan.update_forwards


def noise_to_signal(estimates: Tensor) -> tuple[float, float]:
    """Of [groups, dimensions], and its standard error from splitting the groups into parts."""

    def of(values: Tensor, signal: Tensor) -> float:
        return (values.var(0).sum() / signal).item()

    # An estimated mean's square is too large by the estimate's variance.
    signal = estimates.mean(0).square().sum() - estimates.var(0).sum() / len(estimates)
    parts = torch.tensor([of(part, signal) for part in estimates.chunk(PARTS)])
    return of(estimates, signal), (parts.std() / PARTS**0.5).item()


def measure(groups: int, seed: int) -> list[dict[str, Any]]:
    schedule = flow_schedule([1 - level / STEPS for level in range(STEPS + 1)])
    center = torch.tensor([1.0, -0.5, 0.5, 0.0], dtype=torch.float64)
    gaussian = Gaussian(schedule, center, 0.6)
    direction = torch.ones(DIMENSIONS, dtype=torch.float64) / DIMENSIONS**0.5
    rewards = {
        "linear": linear_reward(direction),
        "quadratic": quadratic_reward(center + 0.5),
        "threshold": threshold_reward(4 * direction, 4.0),
    }
    rows: list[dict[str, Any]] = []
    for start in (0, 3, 6):
        for reward_name, reward in rewards.items():
            for name, (plan, mode) in methods(start).items():
                steps = transitions(schedule, plan.stochastic)
                estimates = policy_gradients(
                    gaussian,
                    plan,
                    steps,
                    reward,
                    mode=mode,
                    groups=groups,
                    generator=torch.Generator().manual_seed(seed),
                )
                inside = list(plan.stochastic_steps)
                exact = exact_gradients(gaussian, steps, reward)[inside].sum(0)
                factors = expected_factors(plan, mode)[inside]
                even = (estimates[:, inside] / factors[:, None]).sum(1)
                cost = forwards(plan)
                noise, error = noise_to_signal(even)
                rows.append(
                    {
                        "window_start": start,
                        "reward": reward_name,
                        "method": name,
                        "forwards": cost,
                        "even": noise * cost,
                        "even_standard_error": error * cost,
                        "scale": (even.mean(0) @ exact / exact.square().sum()).item(),
                        "as_trained": noise_to_signal(estimates.sum(1))[0] * cost,
                        "steps": [noise_to_signal(estimates[:, step])[0] * cost for step in inside],
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient noise of trees and flat groups.")
    parser.add_argument("--quick", action="store_true", help="2000 groups instead of 10000")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    groups = 2000 if arguments.quick else 10_000
    rows = measure(groups, arguments.seed)

    print("forwards until the gradient's noise equals its signal (lower is better)\n")
    print(
        f"{'start':>5} {'reward':<10} {'method':<13} {'per group':>9} {'even':>13} {'vs flat':>8}"
        f" {'scale':>6} {'as trained':>10} {'vs flat':>8}  steps"
    )
    for row in rows:
        if row["method"] == "flat":
            flat = row
        for measure_name in ("even", "as_trained"):
            row[f"{measure_name}_gain"] = flat[measure_name] / row[measure_name]
        print(
            f"{row['window_start']:>5} {row['reward']:<10} {row['method']:<13}"
            f" {row['forwards']:>9} {row['even']:>6.0f} +- {row['even_standard_error']:<3.0f}"
            f" {row['even_gain']:>7.2f}x {row['scale']:>6.3f} {row['as_trained']:>10.0f}"
            f" {row['as_trained_gain']:>7.2f}x  {' '.join(f'{step:.0f}' for step in row['steps'])}"
        )
    print(json.dumps({"groups": groups, "seed": arguments.seed, "rows": rows}))


if __name__ == "__main__":
    main()
