"""Stable Diffusion 3 and 3.5 (and the miniature): a rectified flow on a multimodal transformer."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from treegrpo.models.folder import ModelError
from treegrpo.models.policy import Conditioning, Configs, Policy, Sampling, flow_levels
from treegrpo.transition import Schedule


class StableDiffusion3(Policy):
    """`StableDiffusion3Pipeline`, with and without its T5 encoder."""

    pipeline_name: ClassVar = "StableDiffusion3Pipeline"
    defaults: ClassVar = Sampling(steps=28, guidance_scale=7.0, max_sequence_length=256)
    kept_layers: ClassVar = ("text_encoder", "text_encoder_2")
    lora_targets: ClassVar = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    @classmethod
    def default_size(cls, configs: Configs) -> tuple[int, int]:
        size = configs["transformer"]["sample_size"] * _scale(configs)
        return size, size

    @classmethod
    def size_multiple(cls, configs: Configs) -> int:
        return int(_scale(configs) * configs["transformer"]["patch_size"])

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        super().check_sampling(sampling, configs)
        most = configs["transformer"]["pos_embed_max_size"] * cls.size_multiple(configs)
        for name, value in (("height", sampling.height), ("width", sampling.width)):
            if value is not None and value > most:
                raise ModelError(
                    f"model.{name}: got {value}; must be at most {most}, the largest for which the "
                    "network has positions"
                )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        height, width = self.sampling.size
        scale = _scale(self.configs)
        return self.configs["transformer"]["in_channels"], height // scale, width // scale

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        network = self.configs["transformer"]
        # CLIP's tokens, then T5's (or zeros in their place).
        tokens = self.configs["text_encoder"]["max_position_embeddings"]
        tokens += self.sampling.max_sequence_length or 0
        return {
            "embeddings": (tokens, network["joint_attention_dim"]),
            "pooled": (network["pooled_projection_dim"],),
        }

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
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
        if not self.scheduler.config.get("use_dynamic_shifting"):
            return flow_levels(self.scheduler, steps)
        height, width = self.sampling.size
        multiple, config = self.size_multiple(self.configs), self.scheduler.config
        shift = calculate_shift(
            (height // multiple) * (width // multiple),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
        return flow_levels(self.scheduler, steps, mu=shift)

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=conditioning["embeddings"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]
        return output

    def decode_latents(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        latents = latents / config.scaling_factor + config.shift_factor
        images: Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return images


def _scale(configs: Configs) -> int:
    """Pixels per latent, in each direction."""
    return int(2 ** (len(configs["vae"]["block_out_channels"]) - 1))
