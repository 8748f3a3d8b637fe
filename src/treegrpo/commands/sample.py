"""`treegrpo sample`: a picture of samples, one row per prompt.

Left out: sampling (`evaluation/sampling.py`) and drawing (`report/pictures.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from treegrpo.commands.arguments import check_model, check_output
from treegrpo.config import ModelConfig
from treegrpo.errors import UserError
from treegrpo.prompts import load_prompts


def sample_command(
    model: str,
    *,
    prompt: Sequence[str],
    prompts: str | None,
    column: str,
    max_prompts: int | None,
    count: int,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    dtype: Literal["float32", "bfloat16"],
    out: Path,
) -> None:
    """Write a PNG of `count` samples per prompt.

    Args:
        model: a diffusers folder, a folder of LoRA weights, a hub name or "miniature".
        prompt: texts; none where `prompts` is given.
        prompts: where texts come from, as in training.
        column: with the texts there.
        max_prompts: use only so many of them.
        count: images per prompt.
        seed: of the noises.
        steps: denoising steps; None: the model's own.
        guidance_scale: classifier-free guidance; None: the model's own.
        dtype: torch's name of what the network computes in.
        out: the picture.

    Raises:
        UserError: something cannot be used; nothing was sampled.
    """
    if bool(prompt) == bool(prompts):
        raise UserError("prompts: must be given by --prompt or by --prompts, not both")
    loaded = load_prompts(prompts, "held_out", column) if prompts else []
    texts = ([one.text for one in loaded] or list(prompt))[:max_prompts]
    check_model(model, "MODEL")
    check_output(out, "--out")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: got {out}; the picture is a PNG, so its name must end in .png")

    import torch

    from treegrpo.device import default_device
    from treegrpo.evaluation.sampling import decode_batch_of, sample
    from treegrpo.images import middle_frames
    from treegrpo.models.opening import load_weights, open_policy
    from treegrpo.report.pictures import image_grid

    section = ModelConfig(path=model, dtype=dtype, guidance_scale=guidance_scale)
    policy = open_policy(section, device=default_device(), steps=steps)
    policy.prepare(texts)
    load_weights(policy, section, train=False)
    images = sample(
        policy,
        texts,
        images_per_prompt=count,
        steps=policy.sampling.steps,
        generator=torch.Generator(policy.device).manual_seed(seed),
        max_batch=16,
        decode_batch=decode_batch_of(policy),
    )
    image_grid(out, texts, middle_frames(images).cpu())
    print(f"wrote {out}")
