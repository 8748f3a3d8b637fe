"""Write docs/parity.md: every family's deterministic rollout against diffusers' own pipeline.

    python docs/make_parity_table.py

The checkpoints are tiny ones of the real architectures with random weights, made by
tests/tiny_checkpoints. In float32, from the same noises, with the same steps, guidance and size.

Left out: gradients, and checkpoints with published weights.
"""

# ruff: noqa: E501  (A table's row is one line.)

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import test_families  # noqa: E402
import tiny_checkpoints  # noqa: E402

HEADER = """# Parity with diffusers

Images of our all-deterministic rollout against those of diffusers' own pipeline `__call__`, from
the same noises, with the same steps, guidance and size: the largest absolute difference, of pixels
in [0, 1], in float32. The checkpoints are tiny ones of the real architectures with random weights.
Where a checkpoint's own solver is of a higher order (Sana, Wan, Stable Diffusion 1.5), the pipeline
runs its first-order form on the same noise levels, because a rollout is first order. One scheduler
is followed in its levels only: DDIM with `timestep_spacing: trailing` and a number of steps that
does not divide 1000 ends each step beside the level at which diffusers then calls the network
(4.6e-3 at 28 steps); here a step ends where the next one begins.

Prompt embeddings are compared with `encode_prompt`, the calls that model cards show with our
images, and exports by loading them back with diffusers alone, in the tests
(`tests/test_families.py`). `python docs/make_parity_table.py` writes this page.

Variations beside sampling settings are other values in the checkpoint's files; what becomes of each
setting is said [below](#settings-of-a-checkpoint).

| family | variation | pipeline | largest difference |
|---|---|---|---|
"""

SETTINGS = """
## Settings of a checkpoint

What the pipelines read from a checkpoint's files, correct in old ones and refuse, and what becomes
of it here. "Refused" is a message that names the setting, before weights are read. The networks and
the text encoders are diffusers' and transformers' own, so what they read is followed.

### All families

| file | setting | |
|---|---|---|
| any | keys that the class has a default for, left out | followed: the class's default |
| any | a null where a number is needed | refused |
| `model_index.json` | a component that the pipeline can do without (T5 of Stable Diffusion 3, safety checkers), null or left out | followed |
| `model_index.json` | another component left out | refused |
| network and decoder | `in_channels` of the network beside `latent_channels` or `z_dim` of the decoder (4 of them a token in FLUX.1 and Qwen-Image) | refused where they differ: networks for inpainting, filling and depth |
| CLIP's tokenizers | `model_max_length` | followed; where it is left out or beyond the text encoder's `max_position_embeddings`, that counts (diffusers fails) |
| image processor | none is read: pixels from [-1, 1] to [0, 1], clipped | followed |

### Stable Diffusion 1 and 2

| file | setting | |
|---|---|---|
| `unet` | `sample_size`, one number or two | followed |
| `unet` | `sample_size` below 64 by diffusers before 0.9 | followed: 64 |
| `unet` | `sample_size` null | followed with `model.height` and `model.width`, else refused |
| `unet` | `time_cond_proj_dim` (latent consistency) | refused |
| `vae` | `block_out_channels` (the factor), `scaling_factor` | followed |
| `vae` | `shift_factor` | followed: not used |
| `text_encoder` | `use_attention_mask` | followed |
| `scheduler` | `steps_offset` other than 1, `clip_sample` true | followed: 1 and false |
| `scheduler` | `thresholding` true | refused |
| settings | sizes that 8 or the decoder's factor does not divide | refused |
| `safety_checker` | | not loaded: rewards see every image |

### Stable Diffusion XL

| file | setting | |
|---|---|---|
| `unet` | `sample_size`, by whichever diffusers | followed |
| `unet` | `addition_embed_type`, `addition_time_embed_dim`, `projection_class_embeddings_input_dim` beside the second text encoder's `projection_dim` | refused where they do not fit: refiners |
| `unet` | `time_cond_proj_dim` (latent consistency) | refused |
| `vae` | `block_out_channels`, `scaling_factor` | followed |
| `vae` | `latents_mean` and `latents_std` | followed where both are there, as the pipeline does |
| `vae` | `shift_factor` | followed: not used |
| `vae` | `force_upcast` | of no effect: it is about float16, which is not offered |
| `model_index.json` | `force_zeros_for_empty_prompt` | followed |
| `model_index.json` | `add_watermarker` | not followed: images have no watermark |
| `scheduler` | `clip_sample`, `thresholding` true | refused |
| settings | sizes that 8 or the decoder's factor does not divide | refused |

### Stable Diffusion 3

| file | setting | |
|---|---|---|
| `transformer` | `sample_size`, `patch_size` | followed |
| `transformer` | `pos_embed_max_size` | sizes beyond it are refused |
| `transformer` | `joint_attention_dim` without T5 | followed |
| `vae` | `block_out_channels`, `scaling_factor`, `shift_factor` | followed; without `shift_factor` refused (diffusers fails) |
| `scheduler` | `use_dynamic_shifting`, `base_image_seq_len`, `max_image_seq_len`, `base_shift`, `max_shift` | followed |
| settings | `model.max_sequence_length` above 512 | refused |

### FLUX.1

| file | setting | |
|---|---|---|
| `transformer` | `guidance_embeds` | followed |
| `vae` | `block_out_channels`, `scaling_factor`, `shift_factor` | followed; without `shift_factor` refused (diffusers fails) |
| `scheduler` | `use_dynamic_shifting`, `time_shift_type`, `base_image_seq_len`, `max_image_seq_len`, `base_shift`, `max_shift` | followed |
| settings | `model.max_sequence_length` above 512 | refused |

### Qwen-Image

| file | setting | |
|---|---|---|
| `transformer` | `guidance_embeds`, `use_additional_t_cond` true | refused |
| `vae` | `temperal_downsample` (the factor), `latents_mean`, `latents_std` | followed |
| `scheduler` | as FLUX.1's, and `shift_terminal` | followed |
| settings | `model.max_sequence_length` above 1024 | refused |

### Sana

| file | setting | |
|---|---|---|
| `transformer` | `sample_size`, `timestep_scale`, `out_channels` (a learned variance is left out) | followed |
| `transformer` | `guidance_embeds` true (Sana-Sprint) | refused |
| `vae` | `encoder_block_out_channels` (the factor), `scaling_factor` | followed |
| settings | sizes that 32 does not divide | refused |

### Wan 2.1

| file | setting | |
|---|---|---|
| `transformer` | `patch_size`, `rope_max_seq_len` | followed; heights and widths without positions are refused |
| `transformer_2`, `model_index.json` | a second network, `boundary_ratio`, `expand_timesteps` (Wan 2.2) | refused |
| `vae` | `scale_factor_spatial`, `scale_factor_temporal`, `latents_mean`, `latents_std` | followed |
| settings | sizes that 16 or a patch does not divide, frames that are not one more than a multiple of the decoder's factor | refused (the pipeline rounds) |
"""


def main() -> None:
    lines = []
    for case in tiny_checkpoints.cases():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "checkpoint"
            folder.mkdir()
            case.build(folder)
            drawn = [
                (variation, folder, case.variations[variation]) for variation in case.variations
            ]
            for number, (edit, changes) in enumerate(case.edits.items()):
                copy = tiny_checkpoints.edited(folder, Path(name) / str(number), changes)
                drawn.append((edit, copy, {}))
            for variation, checkpoint, sampling in drawn:
                policy = test_families.load(checkpoint, **sampling)
                difference = test_families.difference(case, checkpoint, policy)
                lines.append(
                    f"| {case.name} | {variation} | `{policy.pipeline_name}` | {difference:.1e} |"
                )
                print(lines[-1], flush=True)
    (ROOT / "docs" / "parity.md").write_text(
        HEADER + "\n".join(lines) + "\n" + SETTINGS, encoding="utf-8"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
