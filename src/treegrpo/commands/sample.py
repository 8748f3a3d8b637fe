"""`treegrpo sample`: a picture of samples, one row per prompt.

Left out: sampling (`evaluation/sampling.py`) and drawing (`report/pictures.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treegrpo.commands import arguments
from treegrpo.errors import UserError
from treegrpo.prompts import load_prompts


def sample(
    model: arguments.Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given several times.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help='Prompts from a file or dataset, as in training; or "miniature".'
        ),
    ] = None,
    column: arguments.Column = "prompt",
    max_prompts: arguments.MaxPrompts = None,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noises.")] = 0,
    steps: arguments.Steps = None,
    guidance_scale: arguments.GuidanceScale = None,
    dtype: arguments.DType = "float32",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.")] = Path(
        "grid.png"
    ),
) -> None:
    """Draw a grid of samples, one row per prompt."""
    if bool(prompt) == bool(prompts):
        raise UserError("prompts: must be given by --prompt or by --prompts, not both")
    loaded = load_prompts(prompts, "held_out", column) if prompts else []
    texts = ([one.text for one in loaded] or list(prompt or []))[:max_prompts]
    section = arguments.model_section(model, dtype, guidance_scale)
    arguments.check_model(model, "MODEL")
    arguments.check_output(out, "--out")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: got {out}; the picture is a PNG, so its name must end in .png")

    from treegrpo.device import default_device
    from treegrpo.evaluation import sampling
    from treegrpo.images import middle_frames
    from treegrpo.models.opening import load_weights, open_policy
    from treegrpo.report.pictures import image_grid

    policy = open_policy(section, device=default_device(), steps=steps)
    policy.prepare(texts)
    load_weights(policy, section, train=False)
    draws = sampling.Draws(
        count, policy.sampling.steps, seed, decode_batch=sampling.decode_batch_of(policy)
    )
    image_grid(out, texts, middle_frames(sampling.sample(policy, texts, draws)).cpu())
    print(f"wrote {out}")
