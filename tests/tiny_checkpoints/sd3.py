"""Stable Diffusion 3 without T5 and, in a second case, with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_checkpoints import Case, byte_level_clip_tokenizer, save_pipeline
from treegrpo.models.policy import Conditioning, Sampling


def build(folder: Path, *, t5: bool = True) -> None:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        ByT5Tokenizer,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    tokenizer = byte_level_clip_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5_encoder = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),  # as Stable Diffusion 3.5 medium has them
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
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
            scaling_factor=1.5,
            shift_factor=0.06,
        ),
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5_encoder) if t5 else None,
        tokenizer_3=ByT5Tokenizer(extra_ids=125) if t5 else None,
    )
    save_pipeline(pipeline, folder, {"guidance_scale": 4.5, "max_sequence_length": 24})


def call(pipeline: Any, prompts: list[str], noise: Tensor, sampling: Sampling) -> Tensor:
    height, width = sampling.size
    images: Tensor = pipeline(
        prompts,
        negative_prompt=sampling.negative_prompt,
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
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=sampling.max_sequence_length,
    )
    return {"embeddings": embeddings, "pooled": pooled}


CASES = [
    Case(
        "Stable Diffusion 3.5",
        build,
        call,
        encode,
        variations={
            "guided": {},
            "unguided": {"guidance_scale": 1.0},
            "negative prompt, long prompts": {
                "negative_prompt": "a blur",
                "max_sequence_length": 40,
            },
            "wide": {"height": 16, "width": 24},
        },
        edits={
            "dynamic shifting": {
                "scheduler/scheduler_config.json": {
                    "use_dynamic_shifting": True,
                    "base_image_seq_len": 4,
                    "max_image_seq_len": 32,
                    "max_shift": ...,
                }
            },
            "shift_terminal, Karras' levels": {
                "scheduler/scheduler_config.json": {
                    "shift_terminal": 0.1,
                    "use_karras_sigmas": True,
                }
            },
            "classes' defaults left out": {
                "transformer/config.json": {"patch_size": ...},
                "text_encoder/config.json": {"max_position_embeddings": ...},
            },
        },
    ),
    Case(
        "Stable Diffusion 3.5 without T5",
        partial(build, t5=False),
        call,
        encode,
        absent=("text_encoder_3", "tokenizer_3"),
        edits={
            "no T5 in the index": {"model_index.json": {"text_encoder_3": ..., "tokenizer_3": ...}},
        },
    ),
]
