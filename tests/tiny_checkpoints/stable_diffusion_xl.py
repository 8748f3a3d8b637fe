"""Stable Diffusion XL and, in a second case, SDXL-Turbo."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_checkpoints import Case, byte_level_clip_tokenizer, save_pipeline
from tiny_checkpoints.stable_diffusion import BETAS, clip_config, unet, vae
from treegrpo.models.policy import Conditioning, Sampling


def build(folder: Path, *, turbo: bool = False) -> None:
    from diffusers import (
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = byte_level_clip_tokenizer()
    scheduler: Any = (
        EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1)
        if turbo
        else EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    )
    pipeline = StableDiffusionXLPipeline(
        unet=unet(
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 8,
        ),
        scheduler=scheduler,
        vae=vae(0.13025),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, hidden_act="gelu")),
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=not turbo,
    )
    save_pipeline(pipeline, folder, {"steps": 4, "guidance_scale": 0.0 if turbo else 5.0})


def call(pipeline: Any, prompts: list[str], noise: Tensor, sampling: Sampling) -> Tensor:
    height, width = sampling.size
    # Ours are the network's inputs; the pipeline wants numbers of variance 1, and scales them.
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(sampling.steps)
    scale = (scheduler.sigmas[0] ** 2 + 1) ** 0.5 / scheduler.init_noise_sigma
    images: Tensor = pipeline(
        prompts,
        negative_prompt=sampling.negative_prompt or None,
        latents=noise * scale,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        height=height,
        width=width,
        output_type="pt",
    ).images
    return images


def encode(pipeline: Any, prompts: list[str], sampling: Sampling) -> Conditioning:
    embeddings, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"embeddings": embeddings, "pooled": pooled}


def without_its_noise(pipeline: Any) -> None:
    from diffusers import EulerDiscreteScheduler

    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)


CASES = [
    Case(
        "Stable Diffusion XL",
        build,
        call,
        encode,
        variations={
            "guided": {},
            "unguided": {"guidance_scale": 1.0},
            "negative prompt": {"negative_prompt": "a blur"},
            "wide": {"height": 16, "width": 24},
        },
        edits={
            "latents_mean and latents_std": {
                "vae/config.json": {
                    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
                    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
                    "scaling_factor": 0.5,
                }
            },
            "latents_mean alone": {"vae/config.json": {"latents_mean": [-1.6, 1.8, -1.3, 2.5]}},
            "another scheduler's settings": {
                "scheduler/scheduler_config.json": {
                    "clip_sample": True,
                    "thresholding": True,
                    "algorithm_type": "sde-dpmsolver++",
                }
            },
            "shift_factor of the decoder": {"vae/config.json": {"shift_factor": 0.2}},
            "sample_size 8 of diffusers 0.6": {"unet/config.json": {"_diffusers_version": "0.6.0"}},
            "force_zeros_for_empty_prompt false": {
                "model_index.json": {"force_zeros_for_empty_prompt": False}
            },
            "force_zeros_for_empty_prompt left out": {
                "model_index.json": {"force_zeros_for_empty_prompt": ...}
            },
        },
    ),
    Case(
        "SDXL-Turbo",
        partial(build, turbo=True),
        call,
        encode,
        make_first_order=without_its_noise,
        variations={"unguided": {}, "guided": {"guidance_scale": 3.0}},
    ),
]
