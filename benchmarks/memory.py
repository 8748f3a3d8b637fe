"""Memory as `treegrpo plan` predicts it, against what PyTorch's allocator hands out.

    python benchmarks/memory.py [--quick]

For the miniature in six settings and for a tiny checkpoint of every family, one real iteration of
training runs under the profiler, which records every allocation; a phase's measured peak is the
most that was handed out in it, on top of the weights and the optimizer's state. Two tables follow:
the rollout's peak beside its states stays as the leaves grow, and the update's activations depend
on the micro-batch alone. The last line is one JSON object.

Left out: recipes that no CPU holds (`recipe_memory.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from treegrpo.config import Config, load_config
from treegrpo.memory import Estimate, estimate
from treegrpo.models.policy import Policy
from treegrpo.models.switches import quiet_libraries
from treegrpo.training.build import Run, build
from treegrpo.training.loop import iterate

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_checkpoints

# What is there during the whole iteration; the profiler sees what comes on top.
CONSTANT = ("network", "adapters", "reference", "decoder", "average", "optimizer")
PROMPTS = 32
SMALL = {
    "model.device": "cpu",
    "rollout.window_schedule": "fixed",
    "rollout.steps": 4,
    "rollout.branching": 2,
    "rollout.window_size": 3,
    "rollout.prompts_per_iteration": PROMPTS,
    "rollout.max_batch": 64,
    "rewards": "[{name: jpeg_compressibility}]",
}
# name, changes to the configuration
MINIATURE: dict[str, dict[str, Any]] = {
    "miniature": {"train.micro_batch": 32},
    "miniature, micro_batch 128": {"train.micro_batch": 128},
    "miniature, gradient checkpointing": {
        "train.micro_batch": 128,
        "model.gradient_checkpointing": True,
    },
    "miniature, LoRA": {"train.micro_batch": 128, "model.lora_rank": 8},
    "miniature, LoRA, gradient checkpointing": {
        "train.micro_batch": 128,
        "model.lora_rank": 8,
        "model.gradient_checkpointing": True,
    },
    "miniature, guidance, KL, bfloat16": {
        "train.micro_batch": 32,
        "model.guidance_scale": 2.0,
        "model.dtype": "bfloat16",
        "objective.kl_weight": 0.01,
    },
}


def configuration(changes: dict[str, Any], prompts: Path) -> Config:
    """With an empty cache of embeddings, beside the prompts."""
    own = {
        "prompts.train": prompts,
        "prompts.held_out": prompts,
        "model.embedding_cache": tempfile.mkdtemp(dir=prompts.parent),
    }
    settings = {**SMALL, **own, **changes}
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return call


def measure(config: Config) -> dict[str, int]:
    """Bytes at the peak of each phase: before the first iteration, and of the second."""
    with (
        patch.object(Policy, "prepare", within("encode", Policy.prepare)),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run = build(config)
    encode = peak_by_range(profiler, {"encode"})  # before anything that stays
    iterate(run)  # from now on the optimizer has moments
    run.measure = within("evaluation", run.measure)  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.measure()
    evaluation = peak_by_range(profiler, {"evaluation"})
    collector: Any = run.collector
    learner: Any = run.learner
    collector._grow = within("rollout", collector._grow)
    learner.policy.decode = within("decode", learner.policy.decode)
    learner._at_reference = within("reference", learner._at_reference)
    learner._optimize = within("update", learner._optimize)
    learner.optimizer.step = within("optimizer", learner.optimizer.step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        iterate(run)
    names = {"rollout", "decode", "reference", "update", "optimizer"}
    peaks = evaluation | peak_by_range(profiler, names)
    if not run.method.needs_reference:
        del peaks["reference"]
    return encode | {name: peak + constant_bytes(run) for name, peak in peaks.items()}


def peak_by_range(profiler: Any, names: set[str]) -> dict[str, int]:
    """Bytes that were handed out since the profiler began, at the most, in each named range."""
    events = list(profiler.profiler.kineto_results.events())
    ranges = [(e.start_ns(), e.end_ns(), e.name()) for e in events if e.name() in names]
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks = dict.fromkeys(names, 0)
    live = 0
    for time, size in allocations:
        live += size
        for start, end, name in ranges:
            if start <= time <= end:
                peaks[name] = max(peaks[name], live)
    return peaks


def constant_bytes(run: Run) -> int:
    """Of real tensors: weights, the optimizer's state, the average, the reference."""
    tensors = [*run.policy.network.parameters(), *run.policy.vae.parameters()]
    for state in run.learner.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    if run.learner.average is not None:
        tensors += run.learner.average.shadow_params
    if run.learner.reference is not None:
        tensors += run.learner.reference.parameters()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compare(name: str, config: Config) -> dict[str, dict[str, float]]:
    """Print a model's lines of the table; returns phase to figures."""
    predicted, measured = estimate(config), measure(config)
    figures = {}
    for phase, bytes_measured in measured.items():
        parts = predicted.phase(phase).device
        constant = sum(parts.get(part, 0) for part in CONSTANT)
        total = sum(parts.values())
        figures[phase] = {
            "predicted": total,
            "measured": bytes_measured,
            "ratio": round(total / bytes_measured, 4),
            "ratio_beside_weights": round((total - constant) / (bytes_measured - constant), 4),
        }
        print(
            f"{name:<42}{phase:<11}{total / 2**20:>10.2f}{bytes_measured / 2**20:>10.2f}"
            f"{figures[phase]['ratio']:>8.3f}{figures[phase]['ratio_beside_weights']:>16.3f}"
        )
    return figures


def beside_states(name: str, predicted: Estimate, measured: int) -> int:
    """A phase's measured bytes without what its nature makes grow: states and embeddings."""
    parts = predicted.phase(name).device
    return measured - parts.get("states", 0) - parts.get("embeddings", 0)


def growing_leaves(prompts_file: Path) -> dict[str, Any]:
    """The rollout's peak for 27, 81 and 243 leaves, 16 rows at a time."""
    figures = {}
    print(f"\nrollout, max_batch 16\n{'leaves':>8}{'peak MiB':>12}{'beside states':>16}")
    for leaves, window in ((27, 3), (81, 4), (243, 5)):
        changes = {
            "rollout.branching": 3,
            "rollout.window_size": window,
            "rollout.steps": 5,
            "rollout.max_batch": 16,
            "rollout.prompts_per_iteration": 2,
            "train.micro_batch": 32,
        }
        config = configuration(changes, prompts_file)
        peak = measure(config)["rollout"]
        beside = beside_states("rollout", estimate(config), peak)
        print(f"{leaves:>8}{peak / 2**20:>12.3f}{beside / 2**20:>16.3f}")
        figures[str(leaves)] = {"peak": peak, "beside_states": beside}
    return figures


def growing_updates(prompts_file: Path) -> dict[str, Any]:
    """The update's peak for several numbers of prompts and leaves, at micro-batches 16 and 32."""
    figures = {}
    print(f"\nupdate\n{'micro_batch':>12}{'prompts':>8}{'leaves':>8}{'peak MiB':>12}{'beside':>10}")
    for micro_batch, prompts, window in ((16, 8, 3), (16, 16, 3), (16, 8, 4), (32, 8, 4)):
        changes = {
            "rollout.branching": 3,
            "rollout.window_size": window,
            "rollout.prompts_per_iteration": prompts,
            "train.micro_batch": micro_batch,
        }
        config = configuration(changes, prompts_file)
        peak = measure(config)["update"]
        beside = beside_states("update", estimate(config), peak)
        print(
            f"{micro_batch:>12}{prompts:>8}{3**window:>8}{peak / 2**20:>12.3f}"
            f"{beside / 2**20:>10.3f}"
        )
        name = f"micro_batch {micro_batch}, {prompts} prompts, {3**window} leaves"
        figures[name] = {"peak": peak, "beside_states": beside}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    options = parser.parse_args()
    quiet_libraries()
    miniatures, cases = list(MINIATURE.items()), tiny_checkpoints.cases()
    if options.quick:
        miniatures = miniatures[:1]
        cases = [case for case in cases if case.name == "Stable Diffusion 3.5"]
    results: dict[str, Any] = {}
    print(f"{'MiB':<42}{'phase':<11}{'predicted':>10}{'measured':>10}{'ratio':>8}", end="")
    print(f"{'beside weights':>16}")
    with tempfile.TemporaryDirectory() as temporary:
        # As many as an iteration takes, so that no new one's embeddings are kept meanwhile; and
        # about as long as the prediction assumes, also where they are not padded (Qwen-Image).
        prompts = Path(temporary) / "prompts.txt"
        prompts.write_text("".join(f"{number}{' circles' * 5}\n" for number in range(PROMPTS)))
        for name, changes in miniatures:
            results[name] = compare(name, configuration(changes, prompts))
        for case in cases:
            folder = Path(temporary) / case.name
            folder.mkdir()
            case.build(folder)
            changes = {
                "model.path": folder,
                "train.micro_batch": 128,
            }
            results[case.name] = compare(case.name, configuration(changes, prompts))
        ratios = [figures["ratio"] for model in results.values() for figures in model.values()]
        print(f"\nratios from {min(ratios)} to {max(ratios)}")
        if not options.quick:
            results["rollout by leaves"] = growing_leaves(prompts)
            results["update by micro-batch"] = growing_updates(prompts)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
