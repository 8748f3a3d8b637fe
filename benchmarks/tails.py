"""How well a shortened tail ranks the leaves: correlation of leaf advantages with whole tails'.

    python benchmarks/tails.py [--quick] [--model PATH] [--reward NAME] [--prompts N]

Every window start and number of tail steps, by first-order steps and by the second-order ones that
`rollout.tail_steps` takes. Whole and shortened tails start from the same states, since each prompt
draws from its own generator. Prompts whose rewards are all equal tell nothing and are left out. The
last line is one JSON object.

Left out: what a shortened tail does to learning (`learning.py`) and to time (`iteration.py`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from treegrpo.advantage import leaf_advantages, without_signal
from treegrpo.config import load_config
from treegrpo.images import as_pictures
from treegrpo.plan import RolloutPlan, tree_grpo
from treegrpo.rewards import score
from treegrpo.rollout import rollout
from treegrpo.training.build import Run, build
from treegrpo.transition import Transition, ode


def first_order(run: Run, plan: RolloutPlan) -> tuple[Transition, ...]:
    """The plan's own transitions, with Euler's steps after the window."""
    schedule = run.policy.schedule(run.config.rollout.steps)
    own = run.method.transitions(schedule, plan)
    after = plan.stochastic_steps[-1] + 1
    tail = [ode(schedule, *levels) for levels in pairwise(plan.levels[after:])]
    return own[:after] + tuple(tail)


def advantages(run: Run, plan: RolloutPlan, steps: tuple[Transition, ...], count: int) -> Tensor:
    """[prompts, leaves], always from the same prompts and draws."""
    policy, total = run.policy, run.config.rollout.steps
    prompts = run.sampler.upcoming(count)[:count]
    generators = [torch.Generator(policy.device).manual_seed(n) for n in range(len(prompts))]
    noise = torch.stack([policy.noise(plan.roots, generator) for generator in generators])
    predict = policy.predictor(policy.encode([prompt.text for prompt in prompts]), total)
    schedule = policy.schedule(total)
    forest = rollout(predict, noise, plan, schedule, steps, max_batch=64, generator=generators)
    images = as_pictures(policy.decode(forest.leaves.flatten(0, 1), 64))
    texts = [prompt.text for prompt in prompts for _ in range(plan.leaves)]
    metadata = [dict(prompt.metadata) for prompt in prompts for _ in range(plan.leaves)]
    (reward,) = run.config.trained_rewards
    values = score(reward.key, run.rewards[reward.key], images, texts, metadata, Path("failed"))
    return leaf_advantages([values.view(len(prompts), plan.leaves)], [1.0])


def agreement(whole: Tensor, other: Tensor) -> float:
    told = ~without_signal(whole)
    both = torch.stack([whole[told].flatten(), other[told].flatten()])
    return round(torch.corrcoef(both)[0, 1].item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--reward", default="composition")
    parser.add_argument("--prompts", type=int, default=48)
    options = parser.parse_args()
    quick = options.quick
    prompts, starts = (8, [0]) if quick else (options.prompts, [0, 1, 2, 3, 4])
    tails = [3] if quick else [1, 2, 3]

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        run = build(
            load_config(
                None,
                [
                    f"model.path={options.model}",
                    f"output={Path(folder) / 'run'}",
                    f"rewards=[{{name: {options.reward}}}]",
                ],
            )
        )
        schedule = run.policy.schedule(10)
        print(f"{'window':<10}{'tail':<10}{'first order':>12}{'second order':>14}")
        for start in starts:
            plan = tree_grpo(10, branching=3, window_size=3, window_start=start)
            left = 10 - start - 3
            whole = advantages(run, plan, run.method.transitions(schedule, plan), prompts)
            for tail in (tail for tail in tails if tail < left):
                fast = plan.with_tail(tail)
                first = agreement(whole, advantages(run, fast, first_order(run, fast), prompts))
                own = run.method.transitions(schedule, fast)
                second = agreement(whole, advantages(run, fast, own, prompts))
                print(f"{f'at {start}':<10}{f'{tail} of {left}':<10}{first:>12.3f}{second:>14.3f}")
                figures[f"start_{start}_tail_{tail}"] = {"first": first, "second": second}
    print(json.dumps({"prompts": prompts, **figures}))


if __name__ == "__main__":
    main()
