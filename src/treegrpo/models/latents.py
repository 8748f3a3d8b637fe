"""What several families share: sizes of latents, a flow's noise levels, decoding.

Left out: what one family alone does, which stands in its file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from treegrpo.models.folder import ModelError
from treegrpo.models.policy import Configs, Sampling
from treegrpo.transition import Schedule, flow_schedule


def pixels_per_latent(configs: Configs, levels: str = "block_out_channels") -> int:
    """Pixels per latent, in each direction: each level of the decoder but one doubles them.

    Args:
        configs: the components' configurations.
        levels: the list in the decoder's with an entry per level.
    """
    return int(2 ** (len(configs["vae"][levels]) - 1))


def image_shape(network: Mapping[str, Any], sampling: Sampling, scale: int) -> tuple[int, ...]:
    """Channels, height and width of an image's latents.

    Args:
        network: its configuration.
        sampling: says the image's size.
        scale: pixels per latent.
    """
    height, width = sampling.size
    return network["in_channels"], height // scale, width // scale


def size_in_tokens(sampling: Sampling, multiple: int) -> tuple[int, int]:
    """Height and width of an image in tokens, each of which covers `multiple` pixels a side."""
    height, width = sampling.size
    return height // multiple, width // multiple


def check_prompt_length(sampling: Sampling, longest: int) -> None:
    """Refuse a prompt length beyond the pipeline's own limit.

    Raises:
        ModelError: says the limit.
    """
    if (sampling.max_sequence_length or 0) > longest:
        raise ModelError(
            f"model.max_sequence_length: got {sampling.max_sequence_length}; must be at most "
            f"{longest}"
        )


# --- noise levels ---


def flow_levels(
    scheduler: Any, steps: int, sigmas: Sequence[float] | None = None, **settings: Any
) -> tuple[Schedule, list[float]]:
    """A rectified flow's schedule and timesteps, as the scheduler sets them.

    Args:
        scheduler: the checkpoint's.
        steps: of the schedule.
        sigmas: the levels before the scheduler's own shift; None: its own spacing.
        settings: more for `set_timesteps`, such as `mu`.

    Raises:
        ModelError: the scheduler is not a flow's.
        PlanError: its levels are none that a rollout can follow.
    """
    # FlowMatchEuler schedulers have no such key; others can be a flow's or not.
    if not scheduler.config.get("use_flow_sigmas", True):
        raise ModelError(
            "model.path: the scheduler's use_flow_sigmas is false; must be a flow's scheduler"
        )
    if sigmas is None:
        scheduler.set_timesteps(steps, **settings)
    else:
        scheduler.set_timesteps(sigmas=list(sigmas), **settings)
    return flow_schedule(scheduler.sigmas.tolist()), scheduler.timesteps.tolist()


def shift_for(scheduler: Any, tokens: int, max_shift: float) -> float:
    """How far a scheduler with dynamic shifting moves its levels towards noise (its `mu`).

    Args:
        scheduler: the checkpoint's.
        tokens: of the image.
        max_shift: the pipeline's own, where the scheduler says none.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    shift: float = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
    return shift


def shifted_levels(scheduler: Any, steps: int, tokens: int) -> tuple[Schedule, list[float]]:
    """FLUX.1's noise levels, and those of models that followed.

    They are evenly spaced, shifted towards noise by the image's number of tokens where the
    scheduler says so.
    """
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    return flow_levels(scheduler, steps, sigmas, mu=shift_for(scheduler, tokens, 1.15))


# --- decoding ---


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels in about [-1, 1] of latents that are scaled as the decoder takes them."""
    pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pixels


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents without the decoder's own factor and shift, if it has one."""
    latents = latents / vae.config.scaling_factor
    shift = vae.config.shift_factor
    return latents + shift if shift is not None else latents


def unstandardized(vae: Any, latents: Tensor) -> Tensor:
    """Latents [rows, channels, frames, height, width] with the decoder's own means and deviations.

    Both are numbers per channel in its configuration. The result has the decoder's dtype.
    """
    mean, std = (
        torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents * std + mean).to(vae.dtype)
