"""Stable Diffusion 3 and 3.5 (and the miniature): a rectified flow on a multimodal transformer.

Left out: the ControlNet, inpainting and image-prompt pipelines of the same weights.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from treegrpo.models.folder import ModelError
from treegrpo.models.latents import (
    JOINT_ATTENTION,
    ImageLatents,
    decode,
    flow_levels,
    shift_for,
    unscaled,
)
from treegrpo.models.policy import Conditioning, Configs, Sampling
from treegrpo.transition import Schedule


class StableDiffusion3(ImageLatents):
    """`StableDiffusion3Pipeline`, with and without its T5 encoder."""

    pipeline_name: ClassVar = "StableDiffusion3Pipeline"
    longest_prompt: ClassVar = 512
    optional_parts: ClassVar = ("text_encoder_3", "tokenizer_3")
    defaults: ClassVar = Sampling(steps=28, guidance_scale=7.0, max_sequence_length=256)
    kept_layers: ClassVar = ("text_encoder", "text_encoder_2")
    lora_targets: ClassVar = JOINT_ATTENTION

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """Beyond the network's `pos_embed_max_size` there are no positions."""
        super().check_sampling(sampling, configs)
        configs["vae"]["shift_factor"]  # refused where there is none: the pipeline adds it
        most = configs["transformer"]["pos_embed_max_size"] * cls.size_multiple(configs)
        for name, value in zip(("height", "width"), sampling.size, strict=True):
            if value > most:
                raise ModelError(
                    f"model.{name}: got {value}; must be at most {most}, the largest for which the "
                    "network has positions"
                )

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Both CLIP encoders' tokens, then T5's (or zeros in their place); and pooled CLIP."""
        network = self.configs["transformer"]
        tokens = self.configs["text_encoder"]["max_position_embeddings"]
        tokens += self.sampling.max_sequence_length or 0
        return {
            "embeddings": (tokens, network["joint_attention_dim"]),
            "pooled": (network["pooled_projection_dim"],),
        }

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """By CLIP's two encoders and T5."""
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sampling.max_sequence_length,
        )
        return {"embeddings": embeddings, "pooled": pooled}

    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        """The scheduler's; with dynamic shifting they depend on the size."""
        if not self.scheduler.config.get("use_dynamic_shifting"):
            return flow_levels(self.scheduler, steps)
        (height, width), patch = self.sampling.size, self.size_multiple(self.configs)
        shift = shift_for(self.scheduler, (height // patch) * (width // patch), 1.16)
        return flow_levels(self.scheduler, steps, mu=shift)

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """A velocity."""
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=conditioning["embeddings"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]
        return output

    def decode_latents(self, latents: Tensor) -> Tensor:
        """With the decoder's factor and shift."""
        return decode(self.vae, unscaled(self.vae, latents))
