"""Sana 1 and 1.5: a rectified flow on a linear-attention transformer, prompted through Gemma 2.

Left out: resolution binning, and Sana's distilled relatives, whose pipelines are their own.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

from diffusers import SanaPipeline
from torch import Tensor, nn

from treegrpo.models.latents import ImageLatents, decode, flow_levels, refuse_inputs
from treegrpo.models.policy import Conditioning, Configs, Sampling
from treegrpo.models.text import count_tokens
from treegrpo.transition import Schedule

# The instruction that the pipeline puts before every prompt, but not before a negative one.
_INSTRUCTION: list[str] = (
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)
# Marks a negative prompt among prompts: the same words have another embedding as one.
_NEGATIVE = "\0negative: "


class Sana(ImageLatents):
    """`SanaPipeline`, without resolution binning: an image has the size that was asked for."""

    pipeline_name: ClassVar = "SanaPipeline"
    defaults: ClassVar = Sampling(steps=20, guidance_scale=4.5, max_sequence_length=300)
    lora_targets: ClassVar = ("to_k", "to_q", "to_v")

    @classmethod
    def pixels_per_latent(cls, configs: Configs) -> int:
        """In each direction, by the encoder's levels."""
        return int(2 ** (len(configs["vae"]["encoder_block_out_channels"]) - 1))

    @classmethod
    def size_multiple(cls, configs: Configs) -> int:
        """And the pipeline's own."""
        return math.lcm(32, super().size_multiple(configs))

    @classmethod
    def check_sampling(cls, sampling: Sampling, configs: Configs) -> None:
        """Distilled guidance is refused: it is another pipeline's."""
        super().check_sampling(sampling, configs)
        refuse_inputs(configs, ("guidance_embeds",))

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The prompt's tokens, and which of them are there."""
        tokens = self.sampling.max_sequence_length or 0
        channels = self.configs["transformer"]["caption_channels"]
        return {"embeddings": (tokens, channels), "mask": (tokens,)}

    def encoder_tokens(self) -> int:
        """With the instruction; one of its tokens and the prompt's first are counted once."""
        instruction = count_tokens(self.checkpoint, "\n".join(_INSTRUCTION))
        return instruction + (self.sampling.max_sequence_length or 0) - 2

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """With the instruction, unless it is a negative prompt, which comes alone."""
        is_negative = prompts[0].startswith(_NEGATIVE)
        embeddings, mask, _, _ = pipeline.encode_prompt(
            [prompt.removeprefix(_NEGATIVE) for prompt in prompts],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.sampling.max_sequence_length,
            complex_human_instruction=None if is_negative else _INSTRUCTION,
        )
        return {"embeddings": embeddings, "mask": mask}

    def negative(self) -> Conditioning:
        """Encoded without the instruction."""
        return self.encode([_NEGATIVE + self.sampling.negative_prompt])

    def call_settings(self) -> dict[str, Any]:
        """Without resolution binning."""
        return {**super().call_settings(), "use_resolution_binning": False}

    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        """The scheduler's."""
        return flow_levels(self.scheduler, steps)

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """A velocity."""
        output: Tensor = network(
            x,
            encoder_hidden_states=conditioning["embeddings"],
            encoder_attention_mask=conditioning["mask"],
            timestep=timestep * self.configs["transformer"]["timestep_scale"],
            return_dict=False,
        )[0]
        # Some checkpoints also predict a variance, in as many channels again.
        return output[:, : x.shape[1]]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """With the decoder's factor, which the pipeline divides by in the decoder's dtype."""
        return decode(self.vae, latents.to(self.vae.dtype) / self.vae.config.scaling_factor)
