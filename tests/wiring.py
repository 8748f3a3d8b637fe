"""What a tiny training run shows from outside, for the table in test_wiring.py.

`Observer` trains through the public entry and says what happened, by name: what the network, the
decoder, the optimizer and the rewards were given, and what was written. All that this knows of the
package's insides stands here: the imports, and the functions and classes that `_spies` wraps.

Left out: what a run must show for a setting (the table, test_wiring.py); whether the numbers are
right (the tests of each part).
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from tiny_checkpoints import sd3, wan
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import treegrpo.images
import treegrpo.objective
import treegrpo.report.curve
import treegrpo.report.pictures
import treegrpo.rollout
from treegrpo import checkpoint, run_folder
from treegrpo.config import Config, ModelConfig, load_config
from treegrpo.models.export import export
from treegrpo.models.opening import load_weights, open_policy
from treegrpo.models.switches import quiet_libraries
from treegrpo.report.run import TrainingResult
from treegrpo.rollout import Rollout
from treegrpo.training.loop import train

# By name, what a run showed: numbers, tensors, texts, and lists and dicts of them.
Observations = dict[str, Any]

# --- rewards: named in configurations as `wiring:NAME` ---

Metadata = list[dict[str, Any]] | None


@dataclass
class RewardCall:
    name: str
    images: Tensor
    prompts: list[str]
    metadata: Metadata


# Of the run under way. Rewards are found by their module's name, so this cannot be handed to them.
_reward_calls: list[RewardCall] = []


def _kept(name: str, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """Each color's mean [N, 3], from -0.5 to 0.5: around 0, where rounding is least."""
    _reward_calls.append(RewardCall(name, images, prompts, metadata))
    return (images.double() - 0.5).mean((2, 3))


def brightness(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    return _kept("brightness", images, prompts, metadata).mean(1)


def redness(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    return _kept("redness", images, prompts, metadata)[:, 0]


class Power:
    """Brightness to a power."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        return (_kept("Power", images, prompts, metadata).mean(1) + 0.5) ** self.power


# --- what the runs read ---


def make_files(folder: Path) -> None:
    """Checkpoints and prompts: what `$files/` stands for in a configuration of the table."""
    quiet_libraries()
    for name, scale in (("images", 1.5), ("others", 1.7)):
        sd3.build(folder / name, t5=False)
        # Weights as they are initialized would hardly heed the prompt.
        for part in ("transformer", "text_encoder", "text_encoder_2"):
            (file,) = (folder / name / part).glob("*.safetensors")
            weights = {key: scale * weight for key, weight in load_file(file).items()}
            save_file(weights, file, {"format": "pt"})
    wan.build(folder / "videos")
    start = ModelConfig(path=str(folder / "images"), lora_rank=2, embedding_cache=None)
    policy = open_policy(start, device=torch.device("cpu"))
    load_weights(policy, start, train=True)
    for parameter in policy.network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    export(policy, folder / "lora", start.path)
    for name, first in (("train", 0), ("held_out", 20), ("others", 40)):
        numbers = range(first, first + 12)
        lines = [f'{{"prompt": "no {n}", "caption": "caption {n}", "n": {n}}}\n' for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines))


# --- what a run is seen doing ---


@dataclass
class _Seen:
    """What the spies keep."""

    phase: str = ""  # "rollout" or "evaluation": of the sampling under way, or the last one
    sampling: bool = False
    iteration: int = 0
    stepped: bool = False
    batches: dict[str, list[int]] = field(default_factory=dict)
    decodes: dict[str, list[int]] = field(default_factory=dict)
    rewards: dict[str, list[RewardCall]] = field(default_factory=dict)
    timesteps: dict[str, list[float]] = field(default_factory=dict)
    noises: dict[str, list[Tensor]] = field(default_factory=dict)
    network: list[dict[str, Any]] = field(default_factory=list)
    conditioning: list[Tensor] = field(default_factory=list)
    tiling: set[bool] = field(default_factory=set)
    forests: dict[int, list[Rollout]] = field(default_factory=dict)
    ratios: list[Tensor] = field(default_factory=list)
    advantages: list[Tensor] = field(default_factory=list)
    clip_ranges: set[tuple[float, float]] = field(default_factory=set)
    gradients: list[list[Tensor]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    initial: list[Tensor] = field(default_factory=list)
    on_cpu: list[Tensor] = field(default_factory=list)
    offloaded: set[tuple[str, str, bool]] = field(default_factory=set)
    modules_on_cpu: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)

    def is_on_cpu(self, tensor: Tensor) -> bool:
        """Whether it was sent to the CPU. Where there is no other device, it is the same one."""
        return any(tensor is one for one in self.on_cpu)


def _replace(patch: pytest.MonkeyPatch, function: Callable[..., Any], by: Any) -> None:
    """Under every name that it has in the package."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "treegrpo":
            for attribute, value in list(vars(module).items()):
                if value is function:
                    patch.setattr(module, attribute, by)


@contextmanager
def _spies() -> Iterator[_Seen]:
    seen = _Seen()
    _reward_calls.clear()

    def wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
        """`before` is called with the arguments of each call."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            before(*arguments, **settings)
            return original(*arguments, **settings)

        patch.setattr(owner, name, wrapped)

    def network(
        module: Any,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        **others: Any,
    ) -> None:
        phase = (
            "update" if torch.is_grad_enabled() else seen.phase if seen.sampling else "reference"
        )
        seen.stepped = seen.stepped or phase == "update"
        seen.batches.setdefault(phase, []).append(len(hidden_states))
        seen.timesteps.setdefault(phase, []).append(timestep[0].item())
        seen.conditioning.append(encoder_hidden_states.detach())
        processors = [getattr(part, "processor", None) for part in module.modules()]
        backends = {getattr(one, "_attention_backend", None) for one in processors if one}
        seen.network.append(
            {
                "networks": id(module),
                "device": str(hidden_states.device),
                "weight_dtypes": tuple(sorted({str(p.dtype) for p in module.parameters()})),
                "dtype": str(torch.get_autocast_dtype("cpu"))
                if torch.is_autocast_enabled("cpu")
                else "torch.float32",
                "checkpointing": module.gradient_checkpointing,
                "attention_backends": tuple(
                    sorted(str(getattr(one, "value", one)) for one in backends if one is not None)
                ),
            }
        )

    def decoder(module: Any, latents: Tensor, **others: Any) -> None:
        seen.decodes.setdefault(seen.phase, []).append(len(latents))
        seen.tiling.add(module.use_tiling)

    def rollout(predict: Any, noise: Tensor, plan: Any, *others: Any, **settings: Any) -> Rollout:
        collect_rewards()
        if seen.stepped:  # a rollout after an update is the next iteration's
            seen.iteration, seen.stepped = seen.iteration + 1, False
        starts_late = plan.levels[0] > 0  # a whole tail, to compare a shortened one with
        samples = "rollout" if any(plan.stochastic) else "evaluation"
        seen.phase = "tail_check" if starts_late else samples
        seen.noises.setdefault(seen.phase, []).append(noise)
        seen.offloaded.add((seen.phase, "noise", seen.is_on_cpu(noise)))
        seen.sampling = True
        forest = original_rollout(predict, noise, plan, *others, **settings)
        seen.sampling = False
        if seen.phase == "rollout":
            seen.forests.setdefault(seen.iteration, []).append(forest)
        return forest

    def collect_rewards() -> None:
        seen.rewards.setdefault(seen.phase, []).extend(_reward_calls)
        _reward_calls.clear()

    def as_pictures(images: Tensor) -> Tensor:
        # Rounding to 256 levels would turn a difference in the last bit into one of a level.
        seen.offloaded.add((seen.phase, "images", seen.is_on_cpu(images)))
        return images.float()

    def surrogate(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Any:
        seen.ratios.append(ratio.detach().flatten())
        seen.advantages.append(advantage.flatten())
        seen.clip_ranges.add((clip_low, clip_high))
        return original_surrogate(ratio, advantage, clip_low, clip_high)

    def before_step(optimizer: torch.optim.Optimizer, *others: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not seen.initial:
            seen.initial = [p.detach().clone() for p in parameters]
        seen.gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        seen.rates.append(optimizer.param_groups[0]["lr"])

    def to_cpu(tensor: Tensor, *others: Any) -> None:
        seen.on_cpu.append(tensor)

    def module_to_cpu(module: nn.Module) -> None:
        seen.modules_on_cpu.append(type(module).__name__)

    def compile_network(module: nn.Module) -> None:
        seen.compiled.append(type(module).__name__)

    def save(state: Mapping[str, Any], *others: Any, **settings: Any) -> None:
        seen.saves.append(state["iteration"])

    original_rollout = treegrpo.rollout.rollout
    original_surrogate = treegrpo.objective.clipped_surrogate
    with pytest.MonkeyPatch.context() as patch:
        for network_class in (SD3Transformer2DModel, WanTransformer3DModel):
            wrap(network_class, "forward", network)
        for decoder_class in (AutoencoderKL, AutoencoderKLWan):
            wrap(decoder_class, "decode", decoder)
        for compile_name in ("compile", "compile_repeated_blocks"):
            patch.setattr(SD3Transformer2DModel, compile_name, compile_network)
        wrap(Tensor, "cpu", to_cpu)
        wrap(nn.Module, "cpu", module_to_cpu)
        wrap(torch, "save", save)
        _replace(patch, treegrpo.rollout.rollout, rollout)
        _replace(patch, treegrpo.objective.clipped_surrogate, surrogate)
        _replace(patch, treegrpo.images.as_pictures, as_pictures)
        # Pictures take longer than the training here.
        for picture in (
            treegrpo.report.pictures.before_after,
            treegrpo.report.curve.training_curve,
        ):
            _replace(patch, picture, lambda *arguments, **settings: None)
        hook = register_optimizer_step_pre_hook(before_step)
        try:
            yield seen
        finally:
            hook.remove()
            collect_rewards()


class Observer:
    """Trains, and says what happened. A configuration that was seen is not trained again.

    Args:
        files: from `make_files`.
        runs: a folder, in which each run gets an empty one of its own to work in.
        train: what is looked at.
    """

    def __init__(
        self, files: Path, runs: Path, train: Callable[[Config], TrainingResult] = train
    ) -> None:
        self._files, self._runs, self._train = files, runs, train
        self._numbers = itertools.count()
        self._known: dict[tuple[str, ...], Observations] = {}

    def configure(self, overrides: Iterable[str]) -> Config:
        """`$files` stands for the folder of checkpoints and prompts."""
        return load_config(None, [one.replace("$files", str(self._files)) for one in overrides])

    def __call__(self, overrides: Sequence[str]) -> Observations:
        """
        Raises:
            UserError: the run was refused.
        """
        key = tuple(overrides)
        if key not in self._known:
            self._known[key] = self._observe(key)
        return self._known[key]

    def _observe(self, overrides: tuple[str, ...]) -> Observations:
        folder = self._runs / str(next(self._numbers))
        folder.mkdir(parents=True)
        before = os.getcwd()
        os.chdir(folder)
        messages = io.StringIO()
        try:
            with _spies() as seen, redirect_stdout(messages):
                config = self.configure(overrides)
                result = self._train(config)
        finally:
            os.chdir(before)
        return _told(seen, folder, folder / result.folder, messages.getvalue())


def _told(seen: _Seen, folder: Path, run: Path, messages: str) -> Observations:
    metrics = run_folder.read_lines(run / run_folder.METRICS_FILE)
    evaluations = run_folder.read_lines(run / run_folder.EVALUATIONS_FILE)
    state = checkpoint.load_state(run)
    forests = [treegrpo.rollout.join(parts) for parts in seen.forests.values()]
    moments = state["optimizer"]["state"].values()
    average = state["average"]
    calls = {phase: seen.rewards.get(phase, []) for phase in ("rollout", "evaluation")}
    weights = sorted((run / run_folder.MODEL_FOLDER).rglob("*.safetensors"))
    trained = [p for p in weights if p.parent.name in ("transformer", run_folder.MODEL_FOLDER)]
    movement = [
        after - start for after, start in zip(state["parameters"], seen.initial, strict=True)
    ]
    told: Observations = {
        # What is sampled.
        "prompts": [text for call in calls["rollout"] for text in call.prompts],
        "metadata": [one for call in calls["rollout"] for one in call.metadata or ()],
        "noise": torch.cat(seen.noises["rollout"]),
        "plans": [
            (forest.plan.roots, forest.plan.branching, forest.plan.stochastic) for forest in forests
        ],
        "levels": [forest.plan.levels for forest in forests],
        "tail_checks": [
            index for index, record in enumerate(metrics) if "tail_agreement" in record
        ],
        "window": [int(record["window_start"]) for record in metrics],
        "sigmas": forests[0].schedule.sigma,
        "transitions": [
            (level.step, level.transition.noise_weight, level.transition.std)
            for forest in forests
            for level in forest.levels
        ],
        "conditioning": seen.conditioning[0][:1],
        "leaves": [forest.leaves for forest in forests],
        "log_probs": [level.log_prob for forest in forests for level in forest.levels],
        "rewards": [(record["reward"], record["reward_std"]) for record in metrics],
        "rewards_asked": sorted({call.name for call in calls["rollout"]}),
        "image_sizes": sorted({tuple(call.images.shape[1:]) for call in calls["rollout"]}),
        "images_scored": [len(call.images) for call in calls["rollout"]],
        # What is learned from it.
        # Of the clipped objective; others leave none.
        "advantages": torch.cat([*seen.advantages, torch.empty(0)]),
        "ratios": torch.cat([*seen.ratios, torch.empty(0)]),
        "clip_ranges": sorted(seen.clip_ranges),
        "clip_fractions": [record["clip_fraction"] for record in metrics],
        "losses": [record["loss"] for record in metrics],
        "kl": [record["kl"] for record in metrics],
        "gradient_norms": [record["gradient_norm"] for record in metrics],
        "gradients": [_one(gradient) for gradient in seen.gradients],
        "steps": len(seen.gradients),
        "learning_rates": seen.rates,
        "first_moment": _one([moment["exp_avg"] for moment in moments]),
        "second_moment": _one([moment["exp_avg_sq"] for moment in moments]),
        "movement": _one(movement),
        "average": None if average is None else _one(average["shadow_params"]),
        "trained": [tuple(parameter.shape) for parameter in state["parameters"]],
        "untrained": _one(seen.initial),
        "exported": [list(load_file(path).values()) for path in trained],
        # The work.
        "iterations": len(metrics),
        "rollout_batches": seen.batches["rollout"],
        "update_batches": seen.batches["update"],
        "reference_batches": seen.batches.get("reference", []),
        "evaluation_batches": seen.batches["evaluation"],
        "rollout_decodes": seen.decodes["rollout"],
        "evaluation_decodes": seen.decodes["evaluation"],
        "rollouts": len(seen.noises["rollout"]),
        **{
            name: sorted({call[name] for call in seen.network})
            for name in ("dtype", "weight_dtypes", "checkpointing", "attention_backends")
        },
        "networks": len({call["networks"] for call in seen.network}),
        "tiling": sorted(seen.tiling),
        "offloaded": sorted(
            name for phase, name, yes in seen.offloaded if phase == "rollout" and yes
        ),
        "modules_on_cpu": seen.modules_on_cpu,
        "compiled": seen.compiled,
        "drawn": state["sampler"]["position"],
        "embeddings": len(list((folder / "embeddings").rglob("*.safetensors"))),
        "saved_at": sorted(set(seen.saves)),
        # What is measured and told.
        "evaluations": [_without_times(record) for record in evaluations],
        "evaluation_prompts": [text for call in calls["evaluation"] for text in call.prompts],
        "evaluation_noise": torch.cat(seen.noises["evaluation"]),
        "evaluation_images": [len(call.images) for call in calls["evaluation"]],
        "evaluated_at": [record["iteration"] for record in evaluations],
        "metrics_names": sorted({name for record in metrics for name in record}),
        "accuracy": [record.get("accuracy") for record in metrics],
        "files": sorted(
            # TensorBoard's are named after the second and the process.
            re.sub(r"(tfevents).*", r"\1", str(path.relative_to(folder)))
            for path in folder.rglob("*")
            if path.is_file()
        ),
        "sampling": json.loads((run / run_folder.MODEL_FOLDER / "sampling.json").read_text()),
        "progress": re.findall(r"^[\d:]+ iteration (\d+)/(\d+)", messages, re.MULTILINE),
        "messages": re.sub(r"\d+", "N", messages),
    }
    # Of the first iteration: before any weight has moved.
    for name in ("leaves", "log_probs", "gradients", "rewards", "evaluations", "gradient_norms"):
        told[f"first_{name}"] = told[name][:1]
    # A spy that is passed by would see nothing change.
    for name in ("leaves", "log_probs", "gradients", "prompts", "evaluation_prompts", "exported"):
        assert told[name], f"no {name} were seen; look at what wiring.py wraps"
    for name in ("rollout", "update", "reference", "evaluation"):
        told[f"{name}_timesteps"] = list(dict.fromkeys(seen.timesteps.get(name, [])))
        told[f"{name}_largest"] = max(told[f"{name}_batches"], default=0)
    for name in ("rollout", "evaluation"):
        told[f"{name}_decode_largest"] = max(told[f"{name}_decodes"])
    return told


def _one(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith("seconds")}


# --- comparing ---


def distance(first: Any, second: Any) -> float:
    """Between two observations: the relative difference of their numbers, by the Euclidean norm;
    infinite where anything but a number differs."""
    structures: list[list[object]] = [[], []]
    numbers: list[list[Tensor]] = [[], []]
    for side, value in enumerate((first, second)):
        _flatten(value, structures[side], numbers[side])
    if structures[0] != structures[1]:
        return float("inf")
    one, other = (torch.cat([torch.zeros(0), *side]).double() for side in numbers)
    scale = max(one.norm().item(), other.norm().item())
    return (one - other).norm().item() / scale if scale else 0.0


def _flatten(value: Any, structure: list[object], numbers: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        structure.append(tuple(value.shape))
        numbers.append(value.detach().float().flatten())
    elif isinstance(value, float):
        structure.append("number")
        numbers.append(torch.tensor([value]))
    elif isinstance(value, dict):
        for name in sorted(value):
            structure.append(name)
            _flatten(value[name], structure, numbers)
    elif isinstance(value, list | tuple):
        structure.append(len(value))
        for one in value:
            _flatten(one, structure, numbers)
    else:
        structure.append(value)
