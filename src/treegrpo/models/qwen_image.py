"""Qwen-Image: a rectified flow on a transformer of packed latents, with prompts of any length."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from treegrpo.models.flux import check_prompt_length, shifted_levels
from treegrpo.models.policy import Conditioning, Configs, Policy, Sampling
from treegrpo.transition import Schedule

# The pipeline's own; no configuration holds them.
_DEFAULT_SIZE_IN_LATENTS = 128
_LONGEST_PROMPT = 1024


class QwenImage(Policy):
    """`QwenImagePipeline`."""

    pipeline_name: ClassVar = "QwenImagePipeline"
    # The blank negative prompt is the model card's; the pipeline's own is no guidance.
    defaults: ClassVar = Sampling(
        steps=50, guidance_scale=4.0, negative_prompt=" ", max_sequence_length=512
    )
    kept_layers: ClassVar = ("text_encoder",)
    # Flow-GRPO adapts the text's layers and both feed-forward networks as well.
    lora_targets: ClassVar = ("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v")

    @classmethod
    def default_size(cls, configs: Configs) -> tuple[int, int]:
        size = _DEFAULT_SIZE_IN_LATENTS * _scale(configs)
        return size, size

    @classmethod
    def size_multiple(cls, configs: Configs) -> int:
        return 2 * _scale(configs)  # 2x2 latents are packed into one token

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        super().check_sampling(sampling, configs)
        check_prompt_length(sampling, _LONGEST_PROMPT)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        height, width = self._size_in_tokens
        return height * width, self.configs["transformer"]["in_channels"]

    @property
    def _size_in_tokens(self) -> tuple[int, int]:
        multiple = self.size_multiple(self.configs)
        height, width = self.sampling.size
        return height // multiple, width // multiple

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.sampling.max_sequence_length or 0
        return {
            "embeddings": (tokens, self.configs["transformer"]["joint_attention_dim"]),
            "mask": (tokens,),
        }

    def encoder_tokens(self) -> int:
        pipeline: Any = QwenImagePipeline(self.scheduler, None, None, None, None)
        around = self.count_tokens(pipeline.prompt_template_encode.format(""))
        return around + (self.sampling.max_sequence_length or 0)

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, list[Tensor]]:
        embeddings, mask = pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.sampling.max_sequence_length
        )
        if mask is None:  # all of one length
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
        lengths = mask.sum(1).tolist()
        # Each prompt at its own length: one long prompt must not fill the disk with padding.
        return {
            "embeddings": [row[:length] for row, length in zip(embeddings, lengths, strict=True)],
            "mask": [row[:length].bool() for row, length in zip(mask, lengths, strict=True)],
        }

    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        return shifted_levels(self.scheduler, steps, self.latent_shape[0])

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        embeddings, mask = conditioning["embeddings"], conditioning["mask"]
        # The longest prompt may be in another batch, and attention without a mask is faster.
        shortest, longest = torch.stack(mask.sum(1).aminmax()).tolist()
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep / 1000,
            encoder_hidden_states=embeddings[:, :longest],
            encoder_hidden_states_mask=None if shortest == longest else mask[:, :longest],
            img_shapes=[[(1, *self._size_in_tokens)]] * len(x),
            return_dict=False,
        )[0]
        return output

    def guide(self, given: Tensor, without: Tensor) -> Tensor:
        """Guidance that keeps the length of each token's prediction with the prompt."""
        guided = super().guide(given, without)
        ratio: Tensor = given.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return guided * ratio

    def call_settings(self) -> dict[str, Any]:
        settings = super().call_settings()
        # Without a negative prompt, even an empty one, the pipeline does not guide.
        settings["negative_prompt"] = self.sampling.negative_prompt
        return {"true_cfg_scale": settings.pop("guidance_scale"), **settings}

    def decode_latents(self, latents: Tensor) -> Tensor:
        latents = QwenImagePipeline._unpack_latents(
            latents, *self.sampling.size, _scale(self.configs)
        )
        config = self.vae.config
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = (latents * std + mean).to(self.vae.dtype)
        images: Tensor = self.vae.decode(latents, return_dict=False)[0][:, :, 0]
        return images


def _scale(configs: Configs) -> int:
    """Pixels per latent, in each direction."""
    return int(2 ** len(configs["vae"]["temperal_downsample"]))
