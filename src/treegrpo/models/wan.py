"""Wan 2.1 text to video: a rectified flow on a space-time transformer, prompted by UMT5.

Left out: Wan 2.2, which has two networks or a timestep per token, and image to video.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from treegrpo.models.folder import ModelError
from treegrpo.models.latents import decode, flow_levels, unstandardized
from treegrpo.models.policy import Conditioning, Configs, Policy, Sampling
from treegrpo.transition import Schedule


class Wan(Policy):
    """`WanPipeline` with one network; with `frames` 1 it makes images (videos of one frame)."""

    pipeline_name: ClassVar = "WanPipeline"
    defaults: ClassVar = Sampling(
        steps=50, guidance_scale=5.0, height=480, width=832, frames=81, max_sequence_length=512
    )
    lora_targets: ClassVar = ("to_k", "to_out.0", "to_q", "to_v")  # Flow-GRPO's

    @classmethod
    def pixels_per_latent(cls, configs: Configs) -> int:
        """In height and in width."""
        return int(configs["vae"]["scale_factor_spatial"])

    @classmethod
    def default_size(cls, configs: Configs) -> tuple[int, int]:
        """The pipeline's own."""
        return cls.defaults.size

    @classmethod
    def size_multiple(cls, configs: Configs) -> int:
        """A patch of latents in pixels, of both directions and the pipeline's own."""
        scale, patch = cls.pixels_per_latent(configs), configs["transformer"]["patch_size"]
        return math.lcm(16, scale * int(patch[1]), scale * int(patch[2]))

    @classmethod
    def latent_channels(cls, configs: Configs) -> int:
        """The decoder's."""
        return int(configs["vae"]["z_dim"])

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """Frames that the decoder cannot make are refused."""
        frames, multiple = sampling.frames or 0, _time_scale(configs)
        if frames < 1 or (frames - 1) % multiple:
            below = max(frames - 1, 0) // multiple * multiple + 1
            raise ModelError(
                f"model.frames: got {sampling.frames}; must be one more than a multiple of "
                f"{multiple} (the decoder's factor in time), such as {below} or {below + multiple}"
            )
        network, scale = configs["transformer"], cls.pixels_per_latent(configs)
        for name, value, position in zip(
            ("height", "width"), sampling.size, network["patch_size"][1:], strict=True
        ):
            most = network["rope_max_seq_len"] * position * scale
            if value > most:
                raise ModelError(
                    f"model.{name}: got {value}; must be at most {most}, the largest for which the "
                    "network has positions"
                )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, frames, height, width."""
        assert self.sampling.frames is not None
        height, width = self.sampling.size
        scale = self.pixels_per_latent(self.configs)
        return (
            self.configs["transformer"]["in_channels"],
            (self.sampling.frames - 1) // _time_scale(self.configs) + 1,
            height // scale,
            width // scale,
        )

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The prompt's tokens, padded."""
        tokens = self.sampling.max_sequence_length or 0
        return {"embeddings": (tokens, self.configs["transformer"]["text_dim"])}

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """By UMT5."""
        embeddings, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sampling.max_sequence_length,
            device=self.device,
        )
        return {"embeddings": embeddings}

    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        """The scheduler's."""
        return flow_levels(self.scheduler, steps)

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """A velocity."""
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=conditioning["embeddings"],
            return_dict=False,
        )[0]
        return output

    def decode_latents(self, latents: Tensor) -> Tensor:
        """With the decoder's means and deviations."""
        return decode(self.vae, unstandardized(self.vae, latents)).transpose(1, 2)


def _time_scale(configs: Configs) -> int:
    """Frames per latent."""
    return int(configs["vae"]["scale_factor_temporal"])
