"""A model and the base that it is set beside: opened alike, and scored on the same noises.

Left out: progress, files and messages (`commands/evaluate.py`), figures (`results.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treegrpo.config import ModelConfig
from treegrpo.device import default_device
from treegrpo.evaluation.measure import sample_and_score
from treegrpo.evaluation.results import Comparison
from treegrpo.evaluation.sampling import decode_batch_of
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import load_weights, open_policy
from treegrpo.models.policy import Policy
from treegrpo.prompts import Prompt
from treegrpo.rewards import Reward


def open_pair(model: ModelConfig, base: str | None, *, steps: int | None) -> list[Policy]:
    """The base, if any, and the model, without weights, both sampled as the model is.

    Args:
        model: of the trained model.
        base: a diffusers folder, a hub name or "miniature"; None: the model stands alone.
        steps: denoising steps; None: the model's own.

    Raises:
        ModelError: a checkpoint or a setting cannot be used, or the two cannot be compared.
    """
    device = default_device()
    trained = open_policy(model, device=device, steps=steps)
    if base is None:
        return [trained]
    sampling = asdict(trained.sampling)
    steps = sampling.pop("steps")
    sampling.pop("base_model")
    alone = ModelConfig(path=base, dtype=model.dtype)
    try:
        # What is not of the same family has other settings, which would be refused first.
        family = open_policy(alone, device=device).pipeline_name
        if family != trained.pipeline_name:
            raise ModelError(
                f"{base} is a {family}, {model.path} a {trained.pipeline_name}; they cannot be "
                "compared"
            )
        policy = open_policy(alone.model_copy(update=sampling), device=device, steps=steps)
    except ModelError as error:
        raise ModelError(f"--base: {str(error).removeprefix('model.path: ')}") from error
    if policy.latent_shape != trained.latent_shape:
        raise ModelError(
            f"--base: {base} starts from noise of shape {list(policy.latent_shape)}, {model.path} "
            f"from {list(trained.latent_shape)}; they cannot be compared"
        )
    return [policy, trained]


def score_into(
    comparison: Comparison,
    role: str,
    policy: Policy,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    *,
    seeds: int,
    images_per_prompt: int,
    max_batch: int,
    keep_folder: Path | None,
) -> Iterator[tuple[range, range, Tensor]]:
    """Read a policy's weights and fill its scores in.

    Args:
        comparison: what is filled. A reward that fails is noted there and not asked again.
        role: `BASE` or `TRAINED`.
        policy: without its weights.
        model: the settings that it was opened with.
        prompts: those of the comparison.
        rewards: those of the comparison, by name.
        seeds: of the noises: 0 up to this.
        images_per_prompt: of each seed.
        max_batch: most images sampled at once.
        keep_folder: where a failing reward leaves its images.

    Yields:
        After every batch the indices of its prompts and of its noises, and its images [prompts,
        noises, ...].
    """
    policy.prepare(comparison.prompts)
    load_weights(policy, model, train=False)
    for seed in range(seeds):
        noises = range(seed * images_per_prompt, (seed + 1) * images_per_prompt)
        for part in sample_and_score(
            policy,
            prompts,
            rewards,
            images_per_prompt=images_per_prompt,
            steps=policy.sampling.steps,
            seed=seed,
            max_batch=max_batch,
            decode_batch=decode_batch_of(policy),
            keep_folder=keep_folder,
            failures=comparison.failures,
        ):
            place = slice(part.indices.start, part.indices.stop), slice(noises.start, noises.stop)
            for name, values in part.scores.items():
                comparison.scores[name][role][place] = values.double()
            yield part.indices, noises, part.images


def describe_sampling(policy: Policy) -> dict[str, Any]:
    """How and where a policy's images are made, for reports: pipeline, sampling and device."""
    values = asdict(policy.sampling)
    del values["base_model"]
    device = policy.device
    return {
        "pipeline": policy.pipeline_name,
        "sampling": {name: value for name, value in values.items() if value is not None},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
