"""`treegrpo sample`: a picture of samples, one row per prompt.

Left out: sampling (`evaluation/sampling.py`) and drawing (`report/pictures.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treegrpo.commands import arguments
from treegrpo.config import ModelConfig
from treegrpo.errors import Problems, UserError
from treegrpo.prompts import Prompt, load_prompts


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
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="What guidance leads away from; the model's own if not given."),
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="In pixels; the model's own if not given.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="In pixels; the model's own if not given.")
    ] = None,
    base_model: arguments.BaseModel = None,
    dtype: arguments.DType = "float32",
    device: arguments.Device = "auto",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.")] = Path(
        "grid.png"
    ),
) -> None:
    """Draw a grid of samples, one row per prompt."""
    problems = Problems()
    loaded: list[Prompt] = []
    with problems.collecting():
        if bool(prompt) == bool(prompts):
            raise UserError("prompts: must be given by --prompt or by --prompts, not both")
        loaded = load_prompts(prompts, "held_out", column) if prompts else []
    texts = ([one.text for one in loaded] or list(prompt or []))[:max_prompts]
    section = ModelConfig()
    with problems.collecting(), arguments.named_as_options():
        model, _ = arguments.model_of(model)
        section = arguments.model_section(
            model,
            dtype=dtype,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
        )
        arguments.check_sampled(model, base_model)
    with problems.collecting():
        arguments.check_output(out, "--out")
        if out.suffix.lower() != ".png":
            raise UserError(f"--out: got {out}; the picture is a PNG, so its name must end in .png")
    problems.refuse()

    from treegrpo.device import usable_device
    from treegrpo.evaluation import sampling
    from treegrpo.images import middle_frames
    from treegrpo.models.opening import load_weights, open_policy
    from treegrpo.report.pictures import image_grid

    with arguments.named_as_options():
        policy = open_policy(
            section, device=usable_device(device, "--device"), steps=steps, base_model=base_model
        )
    policy.prepare(texts)
    load_weights(policy, section, train=False)
    draws = sampling.Draws(
        count, policy.sampling.steps, seed, decode_batch=sampling.decode_batch_of(policy)
    )
    image_grid(out, texts, middle_frames(sampling.sample(policy, texts, draws)).cpu())
    print(f"wrote {out}")
