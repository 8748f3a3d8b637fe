"""Wan 2.1, text to video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_checkpoints import Case, save_pipeline
from treegrpo.models.policy import Conditioning, Sampling


def build(folder: Path, **settings: Any) -> None:
    """`settings` are the pipeline's: what makes a checkpoint a Wan 2.2 one."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    encoder = UMT5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, use_cache=False
    )
    pipeline = WanPipeline(
        tokenizer=ByT5Tokenizer(extra_ids=125),
        text_encoder=UMT5EncoderModel(encoder),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[-0.7571, 0.1075, 0.9653, 1.5508],
            latents_std=[2.8184, 1.4541, 2.3275, 1.2196],
        ),
        **settings,
    )
    sampling = {"height": 16, "width": 16, "frames": 5, "max_sequence_length": 32}
    save_pipeline(pipeline, folder, sampling)


def make_first_order(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(
        scheduler.config, solver_order=1, disable_corrector=list(range(1000))
    )


def call(pipeline: Any, prompts: list[str], noise: Tensor, sampling: Sampling) -> Tensor:
    height, width = sampling.size
    videos: Tensor = pipeline(
        prompts,
        negative_prompt=sampling.negative_prompt,
        latents=noise,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        height=height,
        width=width,
        num_frames=sampling.frames,
        max_sequence_length=sampling.max_sequence_length,
        output_type="pt",
    ).frames
    return videos


def encode(pipeline: Any, prompts: list[str], sampling: Sampling) -> Conditioning:
    embeddings, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=sampling.max_sequence_length,
    )
    return {"embeddings": embeddings}


CASES = [
    Case(
        "Wan 2.1",
        build,
        call,
        encode,
        make_first_order=make_first_order,
        variations={
            "guided": {},
            "unguided": {"guidance_scale": 1.0},
            "negative prompt, short prompts": {
                "negative_prompt": "a blur",
                "max_sequence_length": 20,
            },
            "wide, longer": {"height": 16, "width": 32, "frames": 9},
            "one frame": {"frames": 1},
        },
        edits={
            "classes' defaults left out": {
                "vae/config.json": {"scale_factor_spatial": ..., "scale_factor_temporal": ...},
                "transformer/config.json": {"patch_size": ...},
            },
        },
    ),
]
