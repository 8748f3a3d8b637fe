"""Sana 1 and 1.5: a rectified flow on a linear-attention transformer, prompted through Gemma 2."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from diffusers import SanaPipeline
from torch import Tensor, nn

from treegrpo.models.policy import Conditioning, Configs, Policy, Sampling, flow_levels
from treegrpo.transition import Schedule

# The instruction that the pipeline puts before every prompt, but not before a negative one.
_INSTRUCTION: list[str] = (
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)
# Marks a negative prompt among prompts: the same words have another embedding as one.
_NEGATIVE = "\0negative: "


class Sana(Policy):
    """`SanaPipeline`, without resolution binning: an image has the size that was asked for."""

    pipeline_name: ClassVar = "SanaPipeline"
    defaults: ClassVar = Sampling(steps=20, guidance_scale=4.5, max_sequence_length=300)
    lora_targets: ClassVar = ("to_k", "to_q", "to_v")

    @classmethod
    def default_size(cls, configs: Configs) -> tuple[int, int]:
        size = configs["transformer"]["sample_size"] * _scale(configs)
        return size, size

    @classmethod
    def size_multiple(cls, configs: Configs) -> int:
        return int(_scale(configs) * configs["transformer"]["patch_size"])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        height, width = self.sampling.size
        scale = _scale(self.configs)
        return self.configs["transformer"]["in_channels"], height // scale, width // scale

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.sampling.max_sequence_length or 0
        channels = self.configs["transformer"]["caption_channels"]
        return {"embeddings": (tokens, channels), "mask": (tokens,)}

    def encoder_tokens(self) -> int:
        # As the pipeline counts: one of the instruction's tokens and the prompt's first are shared.
        instruction = self.count_tokens("\n".join(_INSTRUCTION))
        return instruction + (self.sampling.max_sequence_length or 0) - 2

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        # A negative prompt is always encoded alone (see `negative`).
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
        return self.encode([_NEGATIVE + self.sampling.negative_prompt])

    def call_settings(self) -> dict[str, Any]:
        return {**super().call_settings(), "use_resolution_binning": False}

    def noise_levels(self, steps: int) -> tuple[Schedule, list[float]]:
        return flow_levels(self.scheduler, steps)

    def forward(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        output: Tensor = network(
            x,
            encoder_hidden_states=conditioning["embeddings"],
            encoder_attention_mask=conditioning["mask"],
            timestep=timestep * self.configs["transformer"].get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        # Some checkpoints also predict a variance, in as many channels again.
        return output[:, : x.shape[1]]

    def decode_latents(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        images: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return images


def _scale(configs: Configs) -> int:
    """Pixels per latent, in each direction."""
    return int(2 ** (len(configs["vae"]["encoder_block_out_channels"]) - 1))
