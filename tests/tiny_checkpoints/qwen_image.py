"""Qwen-Image. The tests' prompts differ in length, so that every batch of them is padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_checkpoints import Case, save_pipeline
from treegrpo.models.policy import Conditioning, Sampling


def _tokenizer(template: str) -> Any:
    """Letters, and the prompt template's words whole, as the real vocabulary has them."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=letters, merges=[], extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    return tokenizer.train_new_from_iterator([template], vocab_size=600)


def build(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    template = QwenImagePipeline(None, None, None, None, None)
    tokenizer = _tokenizer(template.prompt_template_encode)
    prefix = template.prompt_template_encode.partition("{}")[0]
    assert len(tokenizer(prefix).input_ids) == template.prompt_template_encode_start_idx
    text_encoder = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    )
    pipeline = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=16,
            max_image_seq_len=64,
            max_shift=0.9,
            shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.7, 0.4, 0.1, 1.5],
            latents_std=[2.8, 1.4, 2.3, 1.2],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text_encoder),
        tokenizer=tokenizer,
    )
    save_pipeline(pipeline, folder, {"height": 16, "width": 16, "max_sequence_length": 48})


def call(pipeline: Any, prompts: list[str], noise: Tensor, sampling: Sampling) -> Tensor:
    """In a batch; that is also what each prompt gives alone, where nothing is padded."""

    def draw(chosen: slice) -> Tensor:
        height, width = sampling.size
        images: Tensor = pipeline(
            prompts[chosen],
            negative_prompt=[sampling.negative_prompt] * len(prompts[chosen]),
            latents=noise[chosen],
            num_inference_steps=sampling.steps,
            true_cfg_scale=sampling.guidance_scale,
            height=height,
            width=width,
            max_sequence_length=sampling.max_sequence_length,
            output_type="pt",
        ).images
        return images

    together = draw(slice(None))
    alone = torch.cat([draw(slice(row, row + 1)) for row in range(len(prompts))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    return together


def encode(pipeline: Any, prompts: list[str], sampling: Sampling) -> Conditioning:
    embeddings, mask = pipeline.encode_prompt(
        prompts, max_sequence_length=sampling.max_sequence_length
    )
    assert mask is not None and not mask.all()
    return {"embeddings": embeddings, "mask": mask}


CASES = [
    Case(
        "Qwen-Image",
        build,
        call,
        encode,
        variations={
            "guided": {},
            "unguided": {"guidance_scale": 1.0},
            "negative prompt longer than the prompts": {
                "negative_prompt": "a blurred, overexposed picture of nothing"
            },
            "truncated prompts": {"max_sequence_length": 24},
            "all of one length": {"max_sequence_length": 5},
            "wide": {"height": 16, "width": 24},
            "tall": {"height": 40, "width": 24, "guidance_scale": 2.5},
        },
        edits={
            "no shifting, classes' defaults left out": {
                "scheduler/scheduler_config.json": {
                    "use_dynamic_shifting": ...,
                    "max_shift": ...,
                    "shift": 2.0,
                },
                "transformer/config.json": {"guidance_embeds": ..., "patch_size": ...},
            },
        },
    ),
]
