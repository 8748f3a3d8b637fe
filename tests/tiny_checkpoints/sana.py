"""Sana; and with what Sana 1.5 and a learned variance change."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_checkpoints import Case, save_pipeline
from treegrpo.models.policy import Conditioning, Sampling


def instruction(call: Callable[..., Any]) -> list[str]:
    """What the pipeline puts before prompts, from its `__call__`."""
    default: list[str] = inspect.signature(call).parameters["complex_human_instruction"].default
    return default


def gemma_tokenizer() -> Any:
    """300 entries with merges learned from the instruction, which is long without them."""
    from diffusers import SanaPipeline
    from tokenizers import Tokenizer, models, trainers
    from transformers import GemmaTokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        initial_alphabet=list(map(chr, range(33, 127))),
        show_progress=False,
    )
    learned = Tokenizer(models.BPE())
    text = "\n".join(instruction(SanaPipeline.__call__))
    learned.train_from_iterator([text.replace(" ", "▁")], trainer)
    model = json.loads(learned.to_str())["model"]
    return GemmaTokenizer(vocab=model["vocab"], merges=list(map(tuple, model["merges"])))


def build(folder: Path, **transformer: Any) -> None:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    blocks = ("ResBlock",) * 5 + ("EfficientViTBlock",)
    pipeline = SanaPipeline(
        transformer=SanaTransformer2DModel(
            **{
                "sample_size": 2,
                "patch_size": 1,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 8,
                "cross_attention_dim": 16,
                "caption_channels": 16,
                **transformer,
            }
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 5 + ((5,),),
            decoder_qkv_multiscales=((),) * 5 + ((5,),),
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(gemma),
        tokenizer=tokenizer,
    )
    save_pipeline(pipeline, folder, {"max_sequence_length": 16})


def make_first_order(pipeline: Any) -> None:
    config = pipeline.scheduler.config
    pipeline.scheduler = type(pipeline.scheduler).from_config(config, solver_order=1)


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
        use_resolution_binning=False,
        output_type="pt",
    ).images
    return images


def encode(pipeline: Any, prompts: list[str], sampling: Sampling) -> Conditioning:
    embeddings, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=sampling.max_sequence_length,
        complex_human_instruction=instruction(pipeline.__call__),
    )
    return {"embeddings": embeddings, "mask": mask}


CASES = [
    Case(
        "Sana",
        build,
        call,
        encode,
        make_first_order=make_first_order,
        variations={
            "guided": {},
            "unguided": {"guidance_scale": 1.0},
            "negative prompt, long prompts": {
                "negative_prompt": "a blur",
                "max_sequence_length": 40,
            },
            "wide": {"height": 64, "width": 96},
        },
        edits={
            "classes' defaults left out": {
                "transformer/config.json": {"timestep_scale": ..., "patch_size": ...}
            },
        },
    ),
    Case(
        "Sana 1.5",
        # A learned variance is no published checkpoint's; the pipeline allows it.
        partial(build, qk_norm="rms_norm_across_heads", timestep_scale=0.001, out_channels=8),
        call,
        encode,
        make_first_order=make_first_order,
    ),
]
