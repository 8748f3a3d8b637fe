"""FLUX.1 with embedded guidance, as dev, and timestep-distilled, as schnell."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_checkpoints import Case, byte_level_clip_tokenizer, save_pipeline
from treegrpo.models.policy import Conditioning, Sampling


def build(folder: Path, *, dev: bool) -> None:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer = byte_level_clip_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False
    )
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6),
        ),
        # shift is of no effect where the shift is dynamic
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0,
            use_dynamic_shifting=dev,
            base_image_seq_len=16,
            max_image_seq_len=64,
            max_shift=1.5,
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.36,
            shift_factor=0.12,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=ByT5Tokenizer(extra_ids=125),
    )
    save_pipeline(pipeline, folder, {"height": 16, "width": 16, "max_sequence_length": 24})


def call(pipeline: Any, prompts: list[str], noise: Tensor, sampling: Sampling) -> Tensor:
    height, width = sampling.size
    images: Tensor = pipeline(
        prompts,
        latents=noise,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        height=height,
        width=width,
        max_sequence_length=sampling.max_sequence_length,
        output_type="pt",
    ).images
    return images


def encode(pipeline: Any, prompts: list[str], sampling: Sampling) -> Conditioning:
    embeddings, pooled, _ = pipeline.encode_prompt(
        prompts, max_sequence_length=sampling.max_sequence_length
    )
    return {"embeddings": embeddings, "pooled": pooled}


CASES = [
    Case(
        "FLUX.1 dev",
        partial(build, dev=True),
        call,
        encode,
        variations={
            "defaults": {},
            "guidance 1": {"guidance_scale": 1.0},
            "wide": {"height": 16, "width": 24},
            "tall, long prompts": {"height": 32, "width": 20, "max_sequence_length": 40},
        },
        edits={
            "base_shift and linear shifting": {
                "scheduler/scheduler_config.json": {
                    "base_shift": 0.8,
                    "time_shift_type": "linear",
                }
            },
        },
    ),
    Case(
        "FLUX.1 schnell",
        partial(build, dev=False),
        call,
        encode,
        variations={"defaults": {}, "wide": {"height": 16, "width": 24}},
        edits={
            "classes' defaults left out": {"transformer/config.json": {"guidance_embeds": ...}},
        },
    ),
]
