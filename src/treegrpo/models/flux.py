"""FLUX.1: a rectified flow on a transformer of packed latents, with distilled guidance or none.

Left out: the pipeline's true classifier-free guidance, and filling, depth and image prompts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from treegrpo.models.folder import ModelError
from treegrpo.models.latents import JOINT_ATTENTION, PackedFlow, decode, unscaled
from treegrpo.models.policy import Conditioning, Configs, Sampling


class Flux(PackedFlow):
    """`FluxPipeline`: FLUX.1-dev and FLUX.1-schnell.

    The first one's network is told its guidance; the second one's takes none.
    """

    pipeline_name: ClassVar = "FluxPipeline"
    longest_prompt: ClassVar = 512
    defaults: ClassVar = Sampling(steps=28, guidance_scale=3.5, max_sequence_length=longest_prompt)
    guidance_is_embedded: ClassVar = True
    lora_targets: ClassVar = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    @classmethod
    def default_sampling(cls, configs: Configs) -> Sampling:
        """No guidance for FLUX.1-schnell."""
        return cls.defaults if _takes_guidance(configs) else replace(cls.defaults, guidance_scale=1)

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """Guidance that the checkpoint does not take is refused."""
        super().check_sampling(sampling, configs)
        configs["vae"]["shift_factor"]  # refused where there is none: the pipeline adds it
        scale = sampling.guidance_scale
        if not _takes_guidance(configs) and scale > 1:
            raise ModelError(
                f"model.guidance_scale: got {scale:g}; must be null: this checkpoint is "
                "timestep-distilled (as FLUX.1-schnell) and takes none"
            )
        if sampling.negative_prompt:
            raise ModelError(
                f"model.negative_prompt: got {sampling.negative_prompt!r}; must be empty: "
                f"{cls.pipeline_name} samples without classifier-free guidance"
            )

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """T5's tokens, and pooled CLIP."""
        network = self.configs["transformer"]
        return {
            "embeddings": (self.sampling.max_sequence_length or 0, network["joint_attention_dim"]),
            "pooled": (network["pooled_projection_dim"],),
        }

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """By T5 and CLIP."""
        embeddings, pooled, _ = pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.sampling.max_sequence_length
        )
        return {"embeddings": embeddings, "pooled": pooled}

    @cached_property
    def _image_ids(self) -> Tensor:
        """[tokens, 3]: where each token is in the image."""
        ids: Tensor = FluxPipeline._prepare_latent_image_ids(
            1, *self.size_in_tokens, self.device, torch.float32
        )
        return ids

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """A velocity."""
        embeddings = conditioning["embeddings"]
        guidance = torch.full_like(timestep, self.sampling.guidance_scale)
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep / 1000,
            guidance=guidance if _takes_guidance(self.configs) else None,
            encoder_hidden_states=embeddings,
            pooled_projections=conditioning["pooled"],
            txt_ids=torch.zeros(embeddings.shape[1], 3, device=x.device),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return output

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Of unpacked latents, with the decoder's factor and shift."""
        size, scale = self.sampling.size, self.pixels_per_latent(self.configs)
        # No name for what is unpacked: it leaves memory before the decoder begins.
        return decode(
            self.vae, unscaled(self.vae, FluxPipeline._unpack_latents(latents, *size, scale))
        )


def _takes_guidance(configs: Configs) -> bool:
    return bool(configs["transformer"].get("guidance_embeds", False))
