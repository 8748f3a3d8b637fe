"""What several commands are given: the options, and refusals that name the argument.

Left out: what only one command takes (in its own file), the configuration's keys (`config/`).
"""

from __future__ import annotations

import math
import os
import re
from glob import glob
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from treegrpo.config import RECIPES, Config, ModelConfig, configuration_file, load_config
from treegrpo.errors import UserError
from treegrpo.models.folder import check_checkpoint
from treegrpo.rewards import check_reward

# As shells have it for what Ctrl-C ended.
INTERRUPTED = 130

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_OVERRIDE = re.compile(r"[\w.-]+=", re.ASCII)


def _complete_configuration(incomplete: str) -> list[str]:
    return [name for name in (*RECIPES, *glob("*.yaml")) if name.startswith(incomplete)]


ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG.yaml | RECIPE | key.path=value",
        help="A configuration file or a recipe, and changes to it; without any, the miniature job. "
        f"Recipes: {', '.join(RECIPES)}.",
        show_default=False,
        autocompletion=_complete_configuration,
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help='A diffusers folder, a hub name or "miniature".', show_default=False
    ),
]
Column = Annotated[str, typer.Option(help="The column with the prompt.")]
MaxPrompts = Annotated[int | None, typer.Option(min=1, help="Use only the first so many prompts.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps; the model's own if not given.")
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(min=0, help="Classifier-free guidance; the model's own if not given."),
]
DType = Annotated[Literal["float32", "bfloat16"], typer.Option(help="What the models compute in.")]


def read_config(arguments: list[str] | None) -> Config:
    """The configuration of a file or recipe and changes to it, in any order.

    Raises:
        UserError: there are two files, or as `load_config`.
    """
    return load_config(*file_and_changes(arguments))


def file_and_changes(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """The configuration file, if one is given, and the changes to it.

    Raises:
        UserError: there are two files.
    """
    given = arguments or []
    overrides = [argument for argument in given if _OVERRIDE.match(argument)]
    paths = [argument for argument in given if not _OVERRIDE.match(argument)]
    if len(paths) > 1:
        raise UserError(
            f"got {len(paths)} configuration files ({', '.join(paths)}); must be at most one "
            "(a change to it is written key.path=value)"
        )
    return configuration_file(paths[0]) if paths else None, overrides


def model_section(path: str, dtype: DType, guidance_scale: float | None) -> ModelConfig:
    """The configuration's section for a model that is only sampled.

    Raises:
        UserError: the guidance is no number.
    """
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UserError(f"--guidance-scale: got {guidance_scale}; must be finite")
    return ModelConfig(path=path, dtype=dtype, guidance_scale=guidance_scale)


def check_model(model: str, field: str, *, weights: bool = True) -> None:
    """Refuse a model that is neither "miniature", a usable folder nor a hub's name.

    Args:
        field: what it was given as, for the message.
        weights: whether a folder must hold them.

    Raises:
        UserError: names the field and the model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        check_checkpoint(path, field, weights=weights)
        return
    if model == "miniature":
        return
    if path.exists():
        raise UserError(f"{field}: {model} is a file; must be a diffusers folder")
    if model[0] in "./~" or not _HUB_NAME.fullmatch(model):
        raise UserError(
            f'{field}: no folder {model}; must be "miniature", a diffusers folder, or a hub name '
            "such as owner/name"
        )


def check_reward_of(field: str, name: str, options: dict[str, Any] | None = None) -> None:
    """`check_reward`, its message led by what the reward was given as.

    Raises:
        UserError: names the field and the reward.
    """
    try:
        check_reward(name, options)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


def check_output(path: Path | None, option: str) -> None:
    """Refuse a file, if one is given, that cannot be written.

    Raises:
        UserError: names the option and the file.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{option}: no folder {path.parent} to write {path.name} in")
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder; must be a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option}: the folder {path.parent} may not be written to")
