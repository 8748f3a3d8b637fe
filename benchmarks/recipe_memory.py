"""What the recipes and the README's example take of GPU memory, as `treegrpo plan` predicts.

    python benchmarks/recipe_memory.py [--quick]

The checkpoints' published configurations are written down here, so that neither a download nor a
GPU is needed. That they are the right ones shows in the networks' published parameter counts, which
are compared. The last line is one JSON object.

Left out: a measurement beside the estimate (`memory.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from treegrpo.config import Config, configuration_file, load_config
from treegrpo.memory import Measurements, estimate, fitting, suggest

ROOT = Path(__file__).parent.parent

CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
}
CLIP_G = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
UMT5_XXL = {**T5_XXL, "model_type": "umt5", "vocab_size": 256384}

VAE_4 = {
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
VAE_16 = {
    **VAE_4,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "sample_size": 1024,
}
DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

# Hub name: pipeline, its networks (class, configuration), and the trained one's parameters.
CHECKPOINTS: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]], int]] = {
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "diffusers.SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 24,
                    "num_attention_heads": 24,
                    "attention_head_dim": 64,
                    "caption_projection_dim": 1536,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": list(range(13)),
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": ("diffusers.AutoencoderKL", VAE_16),
            "text_encoder": ("transformers.CLIPTextModelWithProjection", CLIP_L),
            "text_encoder_2": ("transformers.CLIPTextModelWithProjection", CLIP_G),
            "text_encoder_3": ("transformers.T5EncoderModel", T5_XXL),
            "scheduler": ("diffusers.FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
        2_243_171_520,
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        {
            "transformer": (
                "diffusers.FluxTransformer2DModel",
                {
                    "patch_size": 1,
                    "in_channels": 64,
                    "num_layers": 19,
                    "num_single_layers": 38,
                    "num_attention_heads": 24,
                    "attention_head_dim": 128,
                    "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768,
                    "guidance_embeds": True,
                },
            ),
            "vae": (
                "diffusers.AutoencoderKL",
                {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
            ),
            "text_encoder": ("transformers.CLIPTextModel", CLIP_L),
            "text_encoder_2": ("transformers.T5EncoderModel", T5_XXL),
            "scheduler": (
                "diffusers.FlowMatchEulerDiscreteScheduler",
                {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
            ),
        },
        11_901_408_320,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        {
            "unet": (
                "diffusers.UNet2DConditionModel",
                {
                    "sample_size": 128,
                    "in_channels": 4,
                    "block_out_channels": [320, 640, 1280],
                    "down_block_types": [
                        "DownBlock2D",
                        "CrossAttnDownBlock2D",
                        "CrossAttnDownBlock2D",
                    ],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                    "transformer_layers_per_block": [1, 2, 10],
                    "attention_head_dim": [5, 10, 20],
                    "cross_attention_dim": 2048,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                    "use_linear_projection": True,
                },
            ),
            "vae": (
                "diffusers.AutoencoderKL",
                {**VAE_4, "scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
            ),
            "text_encoder": ("transformers.CLIPTextModel", CLIP_L),
            "text_encoder_2": ("transformers.CLIPTextModelWithProjection", CLIP_G),
            "scheduler": ("diffusers.EulerDiscreteScheduler", DIFFUSION),
        },
        2_567_463_684,
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        {
            "unet": (
                "diffusers.UNet2DConditionModel",
                {
                    "sample_size": 64,
                    "in_channels": 4,
                    "cross_attention_dim": 768,
                    "attention_head_dim": 8,
                },
            ),
            "vae": ("diffusers.AutoencoderKL", VAE_4),
            "text_encoder": ("transformers.CLIPTextModel", CLIP_L),
            "scheduler": ("diffusers.PNDMScheduler", DIFFUSION),
        },
        859_520_964,
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        "WanPipeline",
        {
            "transformer": (
                "diffusers.WanTransformer3DModel",
                {
                    "patch_size": [1, 2, 2],
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 30,
                    "num_attention_heads": 12,
                    "attention_head_dim": 128,
                    "ffn_dim": 8960,
                    "freq_dim": 256,
                    "text_dim": 4096,
                },
            ),
            "vae": ("diffusers.AutoencoderKLWan", {}),
            "text_encoder": ("transformers.UMT5EncoderModel", UMT5_XXL),
            "scheduler": (
                "diffusers.UniPCMultistepScheduler",
                {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
            ),
        },
        1_418_996_800,
    ),
}

# File to processes and the memory that it says it needs.
RECIPES = {
    "README": (1, "24GB"),
    "sd3.5-medium": (8, "80GB"),
    "sd3.5-medium-multi-reward": (8, "80GB"),
    "sd3.5-medium-lora-80gb": (1, "80GB"),
    "sd3.5-medium-lora-24gb": (1, "24GB"),
    "flux.1-dev-lora": (1, "80GB"),
    "sdxl-lora": (1, "24GB"),
    "sd1.5-lora": (1, "24GB"),
    "wan2.1-1.3b-lora": (1, "24GB"),
}


def write_checkpoint(name: str, folder: Path) -> None:
    """Its configurations, without weights."""
    pipeline, parts, _ = CHECKPOINTS[name]
    index: dict[str, Any] = {"_class_name": pipeline}
    for part in [part for part in parts if part.startswith("text_encoder")]:
        index[part.replace("text_encoder", "tokenizer")] = ["transformers", "AutoTokenizer"]
    for part, (class_path, config) in parts.items():
        library, _, class_name = class_path.partition(".")
        index[part] = [library, class_name]
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir(parents=True)
        (folder / part / file).write_text(json.dumps({"_class_name": class_name, **config}))
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def recipe(name: str, folder: Path) -> Config:
    """A recipe for a GPU, with its checkpoint's configurations in a folder."""
    if name != "README":
        file = configuration_file(name)
    else:
        page = (ROOT / "README.md").read_text(encoding="utf-8")
        file = folder / "mine.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    write_checkpoint(load_config(file, []).model.path, folder)
    return load_config(file, [f"model.path={folder}", "model.device=cuda"])


def bytes_of(memory: str) -> int:
    """Of a GPU that is sold as so many GB."""
    return int(memory.removesuffix("GB")) * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one recipe")
    options = parser.parse_args()
    recipes = {"sd1.5-lora": RECIPES["sd1.5-lora"]} if options.quick else RECIPES
    results: dict[str, Any] = {}
    names = ("max_batch", "decode_batch", "micro_batch")
    print(f"{'GiB':<28}{'GPUs':>5}{'limit':>7}{'peak':>8}  in{'':10}", *names, flush=True)
    for name, (processes, memory) in recipes.items():
        limit = bytes_of(memory)
        with tempfile.TemporaryDirectory() as temporary:
            config = recipe(name, Path(temporary))
            measured = Measurements(config.rollout.steps)
            sizes = fitting(config, limit, processes=processes, measurements=measured)
            needed = estimate(config, sizes, processes=processes, measurements=measured)
            published = {text[2] for text in CHECKPOINTS.values()}
            if needed.parameters not in published:
                sys.exit(f"{name}: {needed.parameters:,} parameters, which no checkpoint has")
            print(
                f"{name:<28}{processes:>5}{limit / 2**30:>7.0f}{needed.peak / 2**30:>8.2f}"
                f"  {needed.fullest.name:<12}",
                *(f"{getattr(sizes, each):>{len(each)}}" for each in names),
                flush=True,
            )
            figures: dict[str, Any] = {
                "processes": processes,
                "limit": limit,
                "peak": needed.peak,
                "batches": vars(sizes),
                "phases": {phase.name: phase.peak for phase in needed.phases},
                "fullest": dict(needed.fullest.device),
                "host": max(sum(phase.host.values()) for phase in needed.phases),
                "disk": dict(needed.disk),
            }
            if needed.peak > limit:
                advice = suggest(config, limit, processes=processes, measurements=measured)
                figures["advice"] = {change.key: change.value for change in advice.changes}
                print(f"  fits: {advice.fits}, with {figures['advice']}", flush=True)
            results[name] = figures
    print(json.dumps(results))


if __name__ == "__main__":
    main()
