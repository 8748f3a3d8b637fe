"""Stable Diffusion 3 and 3.5 (and the miniature): a rectified flow on a multimodal transformer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    calculate_shift,
    retrieve_timesteps,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from treegrpo.models.folder import SAMPLING_FILE
from treegrpo.models.policy import Sampling
from treegrpo.rollout import Predict
from treegrpo.transition import Schedule, flow_schedule

# The attention projections that diffusers' own SD3 training scripts adapt.
LORA_TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings [prompts, tokens, width] and pooled ones [prompts, width]."""

    embeddings: Tensor
    pooled: Tensor

    def take(self, prompt_index: Tensor) -> Conditioning:
        return Conditioning(self.embeddings[prompt_index], self.pooled[prompt_index])


class SD3Policy:
    """A `Policy` over diffusers' `StableDiffusion3Pipeline`."""

    def __init__(
        self,
        source: str,
        index: dict[str, Any],
        sampling: Sampling,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        # A checkpoint without the T5 encoder must be told so again when it is loaded.
        absent = {
            name: None
            for name in ("text_encoder_3", "tokenizer_3")
            if index.get(name, (None, None))[0] is None
        }
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(
            source, dtype=torch.float32, **absent
        )
        frozen = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        for part in (getattr(self.pipeline, name) for name in frozen):
            if part is not None:
                part.requires_grad_(False).to(device).eval()
                if dtype != torch.float32:
                    part.to(dtype)
        # Convolutions run up to twice as fast with the channels last.
        self.pipeline.vae.to(memory_format=torch.channels_last)
        self.transformer: nn.Module = self.pipeline.transformer.to(device)
        self.device, self.dtype = device, dtype
        size = self.transformer.config.sample_size * self.pipeline.vae_scale_factor
        self.sampling = replace(
            sampling, height=sampling.height or size, width=sampling.width or size
        )
        self.forwards = 0
        self._uses_lora = False
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        for start in range(0, len(missing), 32):
            part = missing[start : start + 32]
            embeddings, _, pooled, _ = self.pipeline.encode_prompt(
                part,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.sampling.max_sequence_length,
            )
            for prompt, *encoded in zip(part, embeddings, pooled, strict=True):
                self._encoded[prompt] = (encoded[0], encoded[1])
        embeddings, pooled = zip(*(self._encoded[prompt] for prompt in prompts), strict=True)
        return Conditioning(torch.stack(embeddings), torch.stack(pooled))

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        scale = self.pipeline.vae_scale_factor
        height, width = (self.sampling.height or 0) // scale, (self.sampling.width or 0) // scale
        channels = self.pipeline.transformer.config.in_channels
        return torch.randn(count, channels, height, width, generator=generator, device=self.device)

    def schedule(self, steps: int) -> Schedule:
        return flow_schedule(self._levels(steps)[1])

    def _levels(self, steps: int) -> tuple[list[float], list[float]]:
        """The scheduler's timesteps [steps] and sigmas [steps + 1], as the pipeline sets them."""
        scheduler, extra = self.pipeline.scheduler, {}
        if scheduler.config.get("use_dynamic_shifting"):
            scale = self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size
            tokens = (self.sampling.height or 0) // scale * ((self.sampling.width or 0) // scale)
            extra["mu"] = calculate_shift(
                tokens,
                scheduler.config.get("base_image_seq_len", 256),
                scheduler.config.get("max_image_seq_len", 4096),
                scheduler.config.get("base_shift", 0.5),
                scheduler.config.get("max_shift", 1.16),
            )
        timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", **extra)
        return timesteps.tolist(), scheduler.sigmas.tolist()

    def predictor(
        self, conditioning: Conditioning, steps: int, transformer: nn.Module | None = None
    ) -> Predict:
        timesteps = self._levels(steps)[0]
        guidance_scale = self.sampling.guidance_scale
        unconditional = self.encode([""]) if guidance_scale > 1 else None

        def predict(x: Tensor, step: int, prompt_index: Tensor) -> Tensor:
            chosen = conditioning.take(prompt_index)
            if unconditional is None:
                return self._forward(x, timesteps[step], chosen, transformer)
            empty = unconditional.take(torch.zeros_like(prompt_index))
            both = Conditioning(
                torch.cat([empty.embeddings, chosen.embeddings]),
                torch.cat([empty.pooled, chosen.pooled]),
            )
            without, given = self._forward(
                torch.cat([x, x]), timesteps[step], both, transformer
            ).chunk(2)
            return without + guidance_scale * (given - without)

        return predict

    def _forward(
        self,
        x: Tensor,
        timestep: float,
        conditioning: Conditioning,
        transformer: nn.Module | None,
    ) -> Tensor:
        self.forwards += len(x)
        with torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        ):
            output: Tensor = (transformer or self.transformer)(
                hidden_states=x,
                timestep=torch.full((len(x),), timestep, device=x.device),
                encoder_hidden_states=conditioning.embeddings,
                pooled_projections=conditioning.pooled,
                return_dict=False,
            )[0]
        return output

    @torch.no_grad()
    def decode(self, latents: Tensor, max_batch: int) -> Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images = [
            vae.decode(
                part.to(self.dtype).contiguous(memory_format=torch.channels_last),
                return_dict=False,
            )[0].float()
            for part in torch.split(latents, max_batch)
        ]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str] | None) -> None:
        self.pipeline.transformer.requires_grad_(False)
        self.pipeline.transformer.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                init_lora_weights="gaussian",
                target_modules=list(targets or LORA_TARGETS),
            )
        )
        self._uses_lora = True

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(str(folder))

    def bytes(self) -> int:
        parts = [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]
        return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())

    def save(self, folder: Path, base_model: str) -> None:
        sampling = replace(self.sampling, base_model=base_model if self._uses_lora else None)
        if self._uses_lora:
            config = self.pipeline.transformer.peft_config["default"]
            # A loader takes an alpha that it is not told to be the rank, so the scale must be in
            # the weights.
            state = {
                name: weight * (config.lora_alpha / config.r) if ".lora_B." in name else weight
                for name, weight in get_peft_model_state_dict(self.pipeline.transformer).items()
            }
            self.pipeline.save_lora_weights(folder, transformer_lora_layers=state)
        else:
            self.pipeline.save_pretrained(folder, safe_serialization=True)
        text = json.dumps(asdict(sampling), indent=2)
        (folder / SAMPLING_FILE).write_text(text + "\n", encoding="utf-8")
