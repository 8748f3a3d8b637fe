"""Qwen-Image: a rectified flow on a transformer of packed latents, with prompts of any length.

Left out: the editing and inpainting pipelines of the same family.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from treegrpo.models.latents import PackedFlow, decode, refuse_inputs, unstandardized
from treegrpo.models.policy import Conditioning, Configs, Sampling
from treegrpo.models.text import count_tokens


class QwenImage(PackedFlow):
    """`QwenImagePipeline`."""

    pipeline_name: ClassVar = "QwenImagePipeline"
    longest_prompt: ClassVar = 1024
    # The blank negative prompt is the model card's; the pipeline's own is no guidance.
    defaults: ClassVar = Sampling(
        steps=50, guidance_scale=4.0, negative_prompt=" ", max_sequence_length=512
    )
    kept_layers: ClassVar = ("text_encoder",)
    # Flow-GRPO adapts the text's layers and both feed-forward networks as well.
    lora_targets: ClassVar = ("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v")

    @classmethod
    def pixels_per_latent(cls, configs: Configs) -> int:
        """In each direction."""
        return int(2 ** len(configs["vae"]["temperal_downsample"]))

    @classmethod
    def latent_channels(cls, configs: Configs) -> int:
        """Of a token."""
        return 4 * int(configs["vae"]["z_dim"])

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """A network with inputs that text-to-image sampling has no values for is refused."""
        super().check_sampling(sampling, configs)
        refuse_inputs(configs, ("guidance_embeds", "use_additional_t_cond"))

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The prompt's tokens, and which of them are there."""
        tokens = self.sampling.max_sequence_length or 0
        return {
            "embeddings": (tokens, self.configs["transformer"]["joint_attention_dim"]),
            "mask": (tokens,),
        }

    def encoder_tokens(self) -> int:
        """With the pipeline's template around the prompt."""
        pipeline: Any = QwenImagePipeline(self.scheduler, None, None, None, None)
        around = count_tokens(self.checkpoint, pipeline.prompt_template_encode.format(""))
        return around + (self.sampling.max_sequence_length or 0)

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, list[Tensor]]:
        """Each prompt at its own length: one long prompt must not fill the disk with padding."""
        embeddings, mask = pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.sampling.max_sequence_length
        )
        if mask is None:  # all of one length
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
        lengths = mask.sum(1).tolist()
        return {
            "embeddings": [row[:length] for row, length in zip(embeddings, lengths, strict=True)],
            "mask": [row[:length].bool() for row, length in zip(mask, lengths, strict=True)],
        }

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """A velocity."""
        embeddings, mask = conditioning["embeddings"], conditioning["mask"]
        # The longest prompt may be in another batch, and attention without a mask is faster.
        shortest, longest = torch.stack(mask.sum(1).aminmax()).tolist()
        output: Tensor = network(
            hidden_states=x,
            timestep=timestep / 1000,
            encoder_hidden_states=embeddings[:, :longest],
            encoder_hidden_states_mask=None if shortest == longest else mask[:, :longest],
            img_shapes=[[(1, *self.size_in_tokens)]] * len(x),
            return_dict=False,
        )[0]
        return output

    def guide(self, given: Tensor, without: Tensor) -> Tensor:
        """Guidance that keeps the length of each token's prediction with the prompt."""
        guided = super().guide(given, without)
        ratio: Tensor = given.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return guided * ratio

    def call_settings(self) -> dict[str, Any]:
        """The scale goes by another name, and needs a negative prompt."""
        settings = super().call_settings()
        # Without a negative prompt, even an empty one, the pipeline does not guide.
        settings["negative_prompt"] = self.sampling.negative_prompt
        return {"true_cfg_scale": settings.pop("guidance_scale"), **settings}

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Of unpacked latents, with the decoder's means and deviations: a video's only frame."""
        size, scale = self.sampling.size, self.pixels_per_latent(self.configs)
        # No name for what is unpacked: it leaves memory before the decoder begins.
        return decode(
            self.vae,
            unstandardized(self.vae, QwenImagePipeline._unpack_latents(latents, *size, scale)),
        )[:, :, 0]
