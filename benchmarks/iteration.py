"""Seconds per iteration: TreeGRPO against Flow-GRPO and MixGRPO at the same number of leaves.

    python benchmarks/iteration.py [--quick] [--model PATH] [--rounds N] [--prompts N]

The three methods run the same code on the same checkpoint, prompts, rewards and optimizer; only
the plan differs. They take turns, iteration by iteration, so that a machine whose speed drifts
slows all of them alike. TreeGRPO and MixGRPO use the paper's window (r = 0.5, w = 3): over the
rounds its start takes each value as often as its distribution says, since an early window costs
TreeGRPO more. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from treegrpo.config import load_config
from treegrpo.plan import WindowSchedule
from treegrpo.trainer import Trainer

METHODS = ("tree_grpo", "flow_grpo", "mix_grpo")


def window_starts(window: WindowSchedule, rounds: int) -> list[int]:
    """The window's distribution at evenly spaced quantiles, so that a few rounds represent it."""
    cumulative = list(accumulate(window.probabilities))
    return [
        next(start for start, total in enumerate(cumulative) if total >= (index + 0.5) / rounds)
        for index in range(rounds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per iteration")
    options = parser.parse_args()
    rounds, prompts = (3, 10) if options.quick else (options.rounds, options.prompts)

    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            method: Trainer(
                load_config(
                    None,
                    [
                        f"model.path={options.model}",
                        f"output={Path(folder) / method}",
                        f"rollout.method={method}",
                        "rollout.steps=10",
                        "rollout.trees=1",
                        "rollout.branching=3",
                        "rollout.window_size=3",
                        "rollout.window_schedule=random",
                        "rollout.window_decay=0.5",
                        "rollout.group_size=27",
                        "rollout.transition=flow_sde",
                        f"rollout.prompts_per_iteration={prompts}",
                        "train.updates_per_iteration=1",
                        "train.inner_epochs=1",
                        "train.micro_batch=256",
                        "rollout.max_batch=512",
                        "train.learning_rate=1e-6",
                    ],
                )
            )
            for method in METHODS
        }
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        forwards = {method: [0, 0] for method in METHODS}
        for trainer in trainers.values():
            trainer.iterate()  # warm-up: caches of embeddings and allocators
        for start in window_starts(trainers["tree_grpo"].window, rounds):
            for method, trainer in trainers.items():
                trainer.window = replace(trainer.window, kind="fixed", start=start)
                metrics = trainer.iterate()
                seconds[method].append(metrics["seconds"])
                forwards[method][0] += int(metrics["rollout_forwards"])
                forwards[method][1] += int(metrics["update_forwards"])

    mean = {method: statistics.fmean(seconds[method]) for method in METHODS}
    print(f"{rounds} rounds, {prompts} prompts x 27 leaves, T = 10")
    print(f"{'method':<12}{'seconds':>9}{'median':>9}{'rollout':>10}{'update':>10}")
    for method in METHODS:
        rollout, update = (count / rounds / prompts for count in forwards[method])
        print(
            f"{method:<12}{mean[method]:>9.3f}{statistics.median(seconds[method]):>9.3f}"
            f"{rollout:>10.1f}{update:>10.1f}   forwards per prompt"
        )
    figures = {
        **{f"{method}_seconds": round(mean[method], 4) for method in METHODS},
        "speedup_over_flow_grpo": round(mean["flow_grpo"] / mean["tree_grpo"], 3),
        "speedup_over_mix_grpo": round(mean["mix_grpo"] / mean["tree_grpo"], 3),
        **{f"{method}_forwards": round(sum(forwards[method]) / rounds, 1) for method in METHODS},
        "rounds": rounds,
        "prompts": prompts,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
