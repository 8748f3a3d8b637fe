"""Seconds per iteration: TreeGRPO against Flow-GRPO and MixGRPO at the same number of leaves.

    python benchmarks/iteration.py [--quick] [--model PATH] [--rounds N] [--prompts N]

The methods run the same code on the same checkpoint, prompts, rewards and optimizer; only the plan
differs. The fast tree has three steps after the window (`rollout.tail_steps`). They take turns,
iteration by iteration, so that a machine whose speed drifts slows all of them alike. TreeGRPO and
MixGRPO use the paper's window (r = 0.5, w = 3): over the rounds its start takes each value as often
as its distribution says, since an early window costs TreeGRPO more. The last line is one
JSON object.

Left out: what is learned in that time (`learning.py`), and GPUs of several machines.
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
from treegrpo.methods.window import WindowMethod
from treegrpo.plan import WindowSchedule
from treegrpo.training.build import Run, build
from treegrpo.training.loop import iterate

WINDOW = ("rollout.window_size=3", "rollout.window_schedule=random", "rollout.window_decay=0.5")
TREE = ("rollout.method=tree_grpo", "rollout.trees=1", "rollout.branching=3", *WINDOW)
METHODS = {
    "tree_grpo": TREE,
    "fast": (*TREE, "rollout.tail_steps=3", "rollout.tail_check_every=0"),
    "flow_grpo": ("rollout.method=flow_grpo", "rollout.group_size=27"),
    "mix_grpo": ("rollout.method=mix_grpo", "rollout.group_size=27", *WINDOW),
}


def window_starts(window: WindowSchedule, rounds: int) -> list[int]:
    """The window's distribution at evenly spaced quantiles, so that a few rounds represent it."""
    cumulative = list(accumulate(window.probabilities))
    return [
        next(start for start, total in enumerate(cumulative) if total >= (index + 0.5) / rounds)
        for index in range(rounds)
    ]


def move_window(run: Run, start: int) -> None:
    """Let the next iteration have it there, if its method has one."""
    if isinstance(run.method, WindowMethod):
        run.method.window = replace(run.method.window, kind="fixed", start=start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per iteration")
    options = parser.parse_args()
    rounds, prompts = (3, 10) if options.quick else (options.rounds, options.prompts)

    with tempfile.TemporaryDirectory() as folder:
        runs = {
            method: build(
                load_config(
                    None,
                    [
                        f"model.path={options.model}",
                        f"output={Path(folder) / method}",
                        "rollout.steps=10",
                        *settings,
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
            for method, settings in METHODS.items()
        }
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        forwards = {method: [0, 0] for method in METHODS}
        for run in runs.values():
            iterate(run)  # warm-up: caches of embeddings and allocators
        tree = runs["tree_grpo"].method
        assert isinstance(tree, WindowMethod)
        for start in window_starts(tree.window, rounds):
            for method, run in runs.items():
                move_window(run, start)
                metrics = iterate(run)
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
        "fast_speedup_over_flow_grpo": round(mean["flow_grpo"] / mean["fast"], 3),
        "fast_speedup_over_mix_grpo": round(mean["mix_grpo"] / mean["fast"], 3),
        **{f"{method}_forwards": round(sum(forwards[method]) / rounds, 1) for method in METHODS},
        "rounds": rounds,
        "prompts": prompts,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
