"""What several families share: sizes of latents, a flow's noise levels, packing, decoding.

Left out: what one family alone does, which stands in its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treegrpo.models.folder import ModelError
from treegrpo.models.policy import Configs, Policy
from treegrpo.transition import Schedule, flow_schedule

# The layers of attention over image and text together.
JOINT_ATTENTION = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


class ImageLatents(Policy):
    """A model whose network takes an image's latents as they are."""

    @classmethod
    def default_size(cls, configs: Configs) -> tuple[int, int] | None:
        """The network's `sample_size`, one number or two."""
        size, scale = configs[cls.network_name].get("sample_size"), cls.pixels_per_latent(configs)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return height * scale, width * scale

    @classmethod
    def size_multiple(cls, configs: Configs) -> int:
        """A patch of latents in pixels."""
        return int(cls.pixels_per_latent(configs) * configs[cls.network_name]["patch_size"])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        height, width = self.sampling.size
        scale = self.pixels_per_latent(self.configs)
        return self.configs[self.network_name]["in_channels"], height // scale, width // scale


def refuse_inputs(configs: Configs, switches: Sequence[str]) -> None:
    """Refuse, with a ModelError, a transformer with an input that its pipeline has no value for."""
    for switch in switches:
        if configs["transformer"].get(switch):
            raise ModelError(
                f"model.path: the transformer has {switch} true, an input that the pipeline does "
                "not give; must be false"
            )


# --- noise levels ---


def flow_levels(
    scheduler: Any, steps: int, sigmas: Sequence[float] | None = None, **settings: Any
) -> tuple[Schedule, list[float]]:
    """A rectified flow's schedule and timesteps, as the scheduler sets them.

    `sigmas` are the levels before the scheduler's own shift (None: its own spacing); `settings` go
    to `set_timesteps`.

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

    `max_shift` is the pipeline's own, for where the scheduler says none.
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


# --- packing ---


class PackedFlow(Policy):
    """A rectified flow on tokens of 2x2 latents, as FLUX.1's and those of models that followed."""

    @classmethod
    def default_size(cls, configs: Configs) -> tuple[int, int]:
        """The pipelines' own, 128 latents a side, which no configuration holds."""
        size = 128 * cls.pixels_per_latent(configs)
        return size, size

    @classmethod
    def size_multiple(cls, configs: Configs) -> int:
        """A token in pixels."""
        return 2 * cls.pixels_per_latent(configs)

    @classmethod
    def latent_channels(cls, configs: Configs) -> int:
        """Of a token."""
        return 4 * super().latent_channels(configs)

    @property
    def size_in_tokens(self) -> tuple[int, int]:
        """Height and width."""
        (height, width), token = self.sampling.size, self.size_multiple(self.configs)
        return height // token, width // token

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Tokens, channels."""
        height, width = self.size_in_tokens
        return height * width, self.configs["transformer"]["in_channels"]

    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        """Evenly spaced, shifted by the image's tokens where the scheduler says so."""
        sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        shift = shift_for(self.scheduler, self.latent_shape[0], 1.15)
        return flow_levels(self.scheduler, steps, sigmas, mu=shift)


# --- decoding ---


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels in about [-1, 1] of latents that are scaled as the decoder takes them."""
    pixels: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pixels


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents without the decoder's own factor and shift, both numbers."""
    unshifted: Tensor = latents / vae.config.scaling_factor + vae.config.shift_factor
    return unshifted


def unstandardized(vae: Any, latents: Tensor) -> Tensor:
    """Latents [rows, channels, frames, height, width] with the decoder's own means and deviations.

    Both are numbers per channel in its configuration. The result has the decoder's dtype.
    """
    mean, std = (
        torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents * std + mean).to(vae.dtype)
