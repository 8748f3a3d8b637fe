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
    each: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also write every picture by itself: PROMPT-IMAGE.png, both counted from 0.",
        ),
    ] = None,
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
    with problems.collecting():
        if each is not None and each.exists() and (not each.is_dir() or any(each.iterdir())):
            raise UserError(f"--each: {each} must be a new or an empty folder")
    problems.refuse()

    from PIL import Image

    from treegrpo.device import usable_device
    from treegrpo.evaluation import sampling
    from treegrpo.images import middle_frames, to_uint8
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
    pictures = middle_frames(sampling.sample(policy, texts, draws)).cpu()
    image_grid(out, texts, pictures)
    print(f"wrote {out}")
    if each is not None:
        each.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(to_uint8(pictures.flatten(0, 1))):
            name = "{:03}-{}.png".format(*divmod(number, count))
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(each / name)
        print(f"wrote {len(texts) * count} pictures into {each}")
