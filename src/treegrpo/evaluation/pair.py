"""A model and the base that it is set beside: opened alike, and scored on the same noises.

Left out: progress, files and messages (`commands/evaluate.py`), figures (`results.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treegrpo.config import ModelConfig
from treegrpo.evaluation.measure import sample_and_score
from treegrpo.evaluation.results import Comparison
from treegrpo.evaluation.sampling import Draws
from treegrpo.models.folder import ModelError
from treegrpo.models.opening import load_weights, open_policy
from treegrpo.models.policy import Policy
from treegrpo.rewards import Reward


def open_pair(
    model: ModelConfig,
    base: str | None,
    *,
    device: torch.device,
    steps: int | None,
    base_model: str | None = None,
) -> list[Policy]:
    """The base, if any, and the model, without weights, both sampled as the model is.

    Args:
        model: the section of the trained model.
        base: as `model.path`; None: the model stands alone.
        steps: denoising steps; None: the model's own.
        base_model: what the model's LoRA weights belong to; None: what they say.

    Raises:
        ModelError: a checkpoint or a setting cannot be used, or the two cannot be compared.
    """
    trained = open_policy(model, device=device, steps=steps, base_model=base_model)
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
    rewards: Mapping[str, Reward],
    draws: Draws,
    keep_folder: Path | None,
    frames: Mapping[str, int] | None = None,
) -> Iterator[tuple[range, range, Tensor]]:
    """Read a policy's weights and fill its scores in; a reward that fails is not asked again.

    Args:
        policy: without its weights.
        model: the settings that it was opened with.
        draws: of one seed; the seeds 0, 1, ... follow until all noises are drawn.
        keep_folder: where a failing reward leaves its images.
        frames: as `sample_and_score`.

    Yields:
        After every batch the indices of its prompts and of its noises, and its images [prompts,
        noises, ...].
    """
    policy.prepare([prompt.text for prompt in comparison.prompts])
    load_weights(policy, model, train=False)
    for seed in range(comparison.noises // draws.images_per_prompt):
        start, stop = seed * draws.images_per_prompt, (seed + 1) * draws.images_per_prompt
        for indices, images, scored in sample_and_score(
            policy,
            comparison.prompts,
            rewards,
            replace(draws, seed=seed),
            frames=frames,
            keep_folder=keep_folder,
            failures=comparison.failures,
        ):
            for name, values in scored.items():
                scores = comparison.scores[name][role]
                scores[indices.start : indices.stop, start:stop] = values.double()
            yield indices, range(start, stop), images


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
