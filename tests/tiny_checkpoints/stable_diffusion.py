"""Stable Diffusion 1.5, 2.1 and, in a third case, with the noise schedule's end made pure noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_checkpoints import Case, byte_level_clip_tokenizer, save_pipeline
from treegrpo.models.policy import Conditioning, Sampling

# Common to the published checkpoints.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Stable Diffusion 1.5's PNDM and 2.1's DDIM scheduler.
SCHEDULER = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def clip_config(tokenizer: Any, **settings: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **settings,
    )


def vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scaling_factor,
    )


def build_1_5(folder: Path) -> None:
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = byte_level_clip_tokenizer()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    # With thresholds of 1 it flags nothing.
    safety_checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, projection_dim=8)
    )
    pipeline = StableDiffusionPipeline(
        unet=unet(cross_attention_dim=16, attention_head_dim=2),
        scheduler=PNDMScheduler.from_config({**SCHEDULER, "skip_prk_steps": True}),
        vae=vae(0.18215),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        safety_checker=safety_checker,
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
    )
    save_pipeline(pipeline, folder, {"steps": 4})


def build_2_1(folder: Path, **scheduler: Any) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer = byte_level_clip_tokenizer()
    pipeline = StableDiffusionPipeline(
        unet=unet(
            cross_attention_dim=16,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            upcast_attention=True,
        ),
        scheduler=DDIMScheduler(**SCHEDULER, prediction_type="v_prediction", **scheduler),
        vae=vae(0.18215),
        text_encoder=CLIPTextModel(clip_config(tokenizer, hidden_act="gelu")),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline, folder, {"steps": 4})


def call(pipeline: Any, prompts: list[str], noise: Tensor, sampling: Sampling) -> Tensor:
    height, width = sampling.size
    images: Tensor = pipeline(
        prompts,
        negative_prompt=[sampling.negative_prompt] * len(prompts),
        latents=noise,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        height=height,
        width=width,
        output_type="pt",
    ).images
    return images


def encode(pipeline: Any, prompts: list[str], sampling: Sampling) -> Conditioning:
    return {"embeddings": pipeline.encode_prompt(prompts, "cpu", 1, False)[0]}


def use_ddim(pipeline: Any) -> None:
    """As is customary: with the checkpoint's own settings."""
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)


CASES = [
    Case(
        "Stable Diffusion 1.5",
        build_1_5,
        call,
        encode,
        make_first_order=use_ddim,
        variations={
            "guided": {},
            "unguided": {"guidance_scale": 1.0},
            "negative prompt": {"negative_prompt": "a blur"},
            "tall": {"height": 24, "width": 16},
        },
        edits={
            "sample_size 8 of diffusers 0.6": {
                "unet/config.json": {"sample_size": 8, "_diffusers_version": "0.6.0"},
                "sampling.json": {"steps": 2},
            },
            "sample_size of two numbers": {"unet/config.json": {"sample_size": [12, 8]}},
            "sample_size null, with a size": {
                "unet/config.json": {"sample_size": None},
                "sampling.json": {"height": 16, "width": 16},
            },
            "classes' defaults left out": {
                "unet/config.json": {"in_channels": ..., "out_channels": ...},
                "vae/config.json": {"latent_channels": ..., "scaling_factor": ...},
                "text_encoder/config.json": {"max_position_embeddings": ...},
            },
            "shift_factor of the decoder": {"vae/config.json": {"shift_factor": 0.2}},
            "use_attention_mask": {"text_encoder/config.json": {"use_attention_mask": True}},
        },
    ),
    Case(
        "Stable Diffusion 2.1",
        build_2_1,
        call,
        encode,
        variations={"guided": {}, "unguided": {"guidance_scale": 1.0}},
        edits={
            "clip_sample true, steps_offset 0": {
                "scheduler/scheduler_config.json": {"clip_sample": True, "steps_offset": 0}
            },
        },
    ),
    Case(
        "Stable Diffusion 2.1 from pure noise",
        partial(build_2_1, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        call,
        encode,
    ),
]
