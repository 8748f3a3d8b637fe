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

from treegrpo.evaluation.measure import sample_and_score
from treegrpo.evaluation.results import Comparison
from treegrpo.evaluation.sampling import decode_batch_of, open_sampled
from treegrpo.models.folder import ModelError
from treegrpo.models.policy import Policy, load_weights
from treegrpo.prompts import Prompt
from treegrpo.rewards import Reward


def open_pair(
    model: str, base: str | None, dtype: str, *, steps: int | None, guidance_scale: float | None
) -> list[Policy]:
    """The base, if any, and the model, without weights, both sampled as the model is.

    Args:
        model: as `open_sampled` takes it.
        base: likewise; None: the model stands alone.
        dtype: torch's name of what the networks compute in.
        steps: denoising steps; None: the model's own.
        guidance_scale: classifier-free guidance; None: the model's own.

    Raises:
        ModelError: a checkpoint or a setting cannot be used, or the two cannot be compared.
    """
    trained = open_sampled(model, dtype, steps=steps, guidance_scale=guidance_scale)
    if base is None:
        return [trained]
    overrides = asdict(trained.sampling)
    overrides.pop("base_model")
    try:
        # What is not of the same family has other settings, which would be refused first.
        family = open_sampled(base, dtype).pipeline_name
        if family != trained.pipeline_name:
            raise ModelError(
                f"{base} is a {family}, {model} a {trained.pipeline_name}; they cannot be compared"
            )
        policy = open_sampled(base, dtype, **overrides)
    except ModelError as error:
        raise ModelError(f"--base: {str(error).removeprefix('model.path: ')}") from error
    if policy.latent_shape != trained.latent_shape:
        raise ModelError(
            f"--base: {base} starts from noise of shape {list(policy.latent_shape)}, {model} from "
            f"{list(trained.latent_shape)}; they cannot be compared"
        )
    return [policy, trained]


def score_into(
    comparison: Comparison,
    role: str,
    policy: Policy,
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
    load_weights(policy)
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
