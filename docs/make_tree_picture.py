"""Draw docs/images/tree.png from a real rollout of the miniature (or of another checkpoint).

    python docs/make_tree_picture.py [MODEL] [--prompt TEXT] [--seed N] [--out FILE]

MODEL needs prompts of the miniature's grammar, since its verifiable reward scores the leaves.

Left out: trees of a run: this one is sampled for the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from treegrpo.advantage import backup, leaf_advantages
from treegrpo.config import ModelConfig
from treegrpo.models.opening import load_policy
from treegrpo.plan import tree_grpo
from treegrpo.report.tree import draw_forest
from treegrpo.rewards.composition import composition
from treegrpo.rollout import rollout
from treegrpo.transition import transitions

STEPS = 10
MAX_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="miniature")
    parser.add_argument("--prompt", default="a green triangle above a yellow square")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "tree.png")
    arguments = parser.parse_args()

    plan = tree_grpo(STEPS, branching=3, window_size=3, window_start=1)
    policy = load_policy(ModelConfig(path=arguments.model), device=torch.device("cpu"))
    schedule = policy.schedule(STEPS)
    generator = torch.Generator().manual_seed(arguments.seed)
    guesses: dict[int, Tensor] = {}
    forest = rollout(
        policy.predictor(policy.encode([arguments.prompt]), STEPS),
        policy.noise(plan.roots, generator)[None],
        plan,
        schedule,
        transitions(schedule, plan.stochastic),
        max_batch=MAX_BATCH,
        generator=generator,
        observe=lambda step, clean: guesses.update({step: clean[0]}),
    )
    # The start, the window's levels, and the leaves; the steps between look like their ends.
    window = plan.stochastic_steps
    drawn = {0, *window, window[-1] + 1} & guesses.keys()
    latents = {**{level: guesses[level] for level in drawn}, STEPS: forest.leaves[0]}
    images = {level: policy.decode(rows, MAX_BATCH) for level, rows in latents.items()}

    rewards = composition(images[STEPS], [arguments.prompt] * plan.leaves, None)
    edges = backup(
        leaf_advantages([rewards[None]], [1.0]), [level.log_prob for level in forest.levels], plan
    )
    advantages = {step: level[0] for step, level in zip(window, edges.levels, strict=True)}
    draw_forest(arguments.out, plan, images, advantages, rewards, arguments.prompt, schedule.sigma)
    print(f"wrote {arguments.out} (mean reward {rewards.mean():.2f})")


if __name__ == "__main__":
    main()
