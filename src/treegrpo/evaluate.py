"""A model against rewards on held-out prompts: deterministic sampling from fixed noises."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treegrpo.models.embeddings import cache_folder
from treegrpo.models.policy import Policy, load_policy
from treegrpo.plan import RolloutPlan
from treegrpo.prompts import Prompt, load_prompts
from treegrpo.rewards import Reward, load_reward, score
from treegrpo.rollout import rollout
from treegrpo.transition import transitions


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model.

    Attributes:
        prompts: P prompts.
        scores: reward name to float32 [P, images per prompt].
        kept: indices of the prompts whose images were kept.
        images: float32 [kept, images per prompt, 3, height, width]; a video's middle frame.
        seconds: wall time.
        forwards: model forwards (rows).
    """

    prompts: tuple[str, ...]
    scores: dict[str, Tensor]
    kept: tuple[int, ...]
    images: Tensor
    seconds: float
    forwards: int

    def mean(self, name: str) -> float:
        return self.scores[name].mean().item()

    def standard_error(self, name: str) -> float:
        """Of the mean over prompts (images of one prompt are not independent)."""
        means = self.scores[name].mean(1)
        return float(means.std(correction=min(1, len(means) - 1)) / len(means) ** 0.5)


def sample(
    policy: Policy,
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    steps: int,
    generator: torch.Generator,
    max_batch: int,
    decode_batch: int | None = None,
    frames: int | None = None,
) -> Tensor:
    """Deterministic samples: float32 [prompts, images_per_prompt, 3, height, width] in [0, 1], or
    videos [prompts, videos_per_prompt, frames, 3, height, width]."""
    plan = RolloutPlan(images_per_prompt, (1,) * steps, (False,) * steps)
    schedule = policy.schedule(steps)
    noise = policy.noise(len(prompts) * images_per_prompt, generator)
    forest = rollout(
        policy.predictor(policy.encode(prompts), steps),
        noise.view(len(prompts), images_per_prompt, *noise.shape[1:]),
        plan,
        schedule,
        transitions(schedule, plan.stochastic),
        max_batch=max_batch,
    )
    leaves = forest.leaves.flatten(0, 1)
    images = policy.decode(leaves, decode_batch or max_batch, frames)
    return images.view(len(prompts), images_per_prompt, *images.shape[1:])


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    *,
    images_per_prompt: int,
    steps: int,
    seed: int,
    max_batch: int,
    decode_batch: int | None = None,
    keep: Sequence[int] = (),
    keep_folder: Path | None = None,
    frames: Mapping[str, int] | None = None,
) -> Evaluation:
    """Score a model on prompts; the same seed gives every model the same noises.

    Args:
        keep: indices of prompts whose images are kept.
        keep_folder: where a failing reward leaves its images.
        frames: by reward, how many of a video's it is asked about; 4 if not given.

    Raises:
        RewardError: a reward failed.
    """
    start, forwards = time.perf_counter(), policy.forwards
    generator = torch.Generator(policy.device).manual_seed(seed)
    scores: dict[str, list[Tensor]] = {name: [] for name in rewards}
    kept: list[Tensor] = []
    chunk = max(1, max_batch // images_per_prompt)
    for offset in range(0, len(prompts), chunk):
        part = list(prompts[offset : offset + chunk])
        images = sample(
            policy,
            [prompt.text for prompt in part],
            images_per_prompt=images_per_prompt,
            steps=steps,
            generator=generator,
            max_batch=max_batch,
            decode_batch=decode_batch,
            frames=max((frames or {"": 4}).values()),
        )
        texts = [prompt.text for prompt in part for _ in range(images_per_prompt)]
        metadata = [dict(prompt.metadata) for prompt in part for _ in range(images_per_prompt)]
        for name, reward in rewards.items():
            values = score(
                name,
                reward,
                images.flatten(0, 1),
                texts,
                metadata,
                keep_folder,
                (frames or {}).get(name, 4),
            )
            scores[name].append(values.view(len(part), images_per_prompt))
        wanted = [index - offset for index in sorted(keep) if 0 <= index - offset < len(part)]
        kept.append(middle_frames(images[wanted]).cpu())
    return Evaluation(
        tuple(prompt.text for prompt in prompts),
        {name: torch.cat(parts) for name, parts in scores.items()},
        tuple(sorted(keep)),
        torch.cat(kept),
        time.perf_counter() - start,
        policy.forwards - forwards,
    )


def middle_frames(images: Tensor) -> Tensor:
    """Images as they are; of videos [..., frames, 3, height, width] the middle frame."""
    return images[:, :, images.shape[2] // 2] if images.dim() == 6 else images


def default_device() -> torch.device:
    """The accelerator that torch sees, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def sample_grid(
    model: str,
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    out: Path,
) -> None:
    """`treegrpo sample`: a picture of `count` samples per prompt."""
    from treegrpo.report.pictures import image_grid

    policy = load_policy(
        model,
        device=default_device(),
        cache=cache_folder(),
        steps=steps,
        guidance_scale=guidance_scale,
    )
    images = sample(
        policy,
        prompts,
        images_per_prompt=count,
        steps=policy.sampling.steps,
        generator=torch.Generator(policy.device).manual_seed(seed),
        max_batch=64,
    )
    image_grid(out, prompts, middle_frames(images).cpu())
    print(f"wrote {out}")


def evaluate_command(
    model: str,
    *,
    prompts: str,
    reward: Sequence[str],
    images_per_prompt: int,
    max_prompts: int | None,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    json_file: Path | None,
) -> Evaluation:
    """`treegrpo evaluate`: print each reward's mean and standard error, and write them as JSON."""
    from rich.console import Console
    from rich.table import Table

    rewards = {name: load_reward(name) for name in reward}
    texts = load_prompts(prompts, "held_out")[:max_prompts]
    policy = load_policy(
        model,
        device=default_device(),
        cache=cache_folder(),
        steps=steps,
        guidance_scale=guidance_scale,
    )
    result = evaluate(
        policy,
        texts,
        rewards,
        images_per_prompt=images_per_prompt,
        steps=policy.sampling.steps,
        seed=seed,
        max_batch=256,
    )
    table = Table("reward", "mean", "standard error")
    figures: dict[str, Any] = {}
    for name in rewards:
        mean, error = result.mean(name), result.standard_error(name)
        table.add_row(name, f"{mean:.4f}", f"{error:.4f}")
        figures[name] = {"mean": mean, "standard_error": error}
    Console().print(table)
    if json_file is not None:
        summary = {
            "model": model,
            "prompts": len(texts),
            "images_per_prompt": images_per_prompt,
            "seed": seed,
            "rewards": figures,
        }
        json_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return result
