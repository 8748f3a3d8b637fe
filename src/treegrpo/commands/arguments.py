"""What several commands are given: the options, and refusals that name the argument.

Left out: what only one command takes (in its own file), the configuration's keys (`config/`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from treegrpo.config import (
    RECIPES,
    Config,
    ConfigError,
    ModelConfig,
    changed,
    configuration_file,
    load_config,
)
from treegrpo.errors import Problems, UserError
from treegrpo.models.folder import (
    INDEX_FILE,
    LORA_FILE,
    SAMPLING_FILE,
    check_checkpoint,
    check_hub,
    read_json,
    tensor_names,
)
from treegrpo.rewards import check_reward, reach_reward
from treegrpo.run_folder import CONFIG_FILE, MODEL_FOLDER

# As shells have it for what Ctrl-C ended.
INTERRUPTED = 130

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_OVERRIDE = re.compile(r"[\w.-]+=", re.ASCII)
# Of the section `model`, keys that commands have as options.
_OPTIONS = ("guidance_scale", "height", "width", "negative_prompt", "device", "dtype")


def _complete_configuration(incomplete: str) -> list[str]:
    return [name for name in (*RECIPES, *glob("*.yaml")) if name.startswith(incomplete)]


DEFAULT_RECIPE = "miniature-fast"

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG.yaml | RECIPE | RUN | key.path=value",
        help="A configuration file, a recipe or a run's folder, and changes to it; without a "
        f"file or a model.path, the miniature job ({DEFAULT_RECIPE}). "
        f"Recipes: {', '.join(RECIPES)}.",
        show_default=False,
        autocompletion=_complete_configuration,
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help='A diffusers folder, a run\'s folder, a hub name or "miniature".',
        show_default=False,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Where the model is to which MODEL's LoRA weights belong.",
        show_default="as they say",
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
Device = Annotated[
    str, typer.Option(help='The torch device; "auto" is an accelerator if there is one.')
]


def read_config(arguments: list[str] | None, problems: Problems) -> tuple[Config, frozenset[str]]:
    """The configuration of a file, a recipe or a run's folder, and changes to it, in any order.

    Args:
        problems: takes what is wrong with keys; these have their defaults then.

    Returns:
        It, and the sections of which keys are wrong.

    Raises:
        UserError: there are two files, or one cannot be read.
    """
    path, overrides = file_and_changes(arguments)
    try:
        return load_config(path, overrides), frozenset()
    except ConfigError as error:
        if error.rest is None:
            raise
        with problems.collecting():
            raise
        return error.rest, error.faulty


def file_and_changes(
    arguments: list[str] | None, otherwise: str = DEFAULT_RECIPE
) -> tuple[Path | None, list[str]]:
    """The configuration file (a run's, for its folder), and the changes to it.

    Args:
        otherwise: the recipe that counts where neither a file nor a model is given.

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
    if not paths and not any(change.startswith("model.path=") for change in overrides):
        paths = [otherwise]
    path = Path(paths[0]).expanduser() if paths else None
    if path is not None and (path / CONFIG_FILE).is_file():
        # The run may have been moved.
        return path / CONFIG_FILE, [f"output={path}", *overrides]
    return None if path is None else configuration_file(str(path)), overrides


def model_section(path: str, **settings: Any) -> ModelConfig:
    """The configuration's section for a model that is only sampled; see `named_as_options`.

    Raises:
        UserError: a setting cannot be used.
    """
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model.{name}: got {value}; must be finite")
    return changed(Config(), {f"model.{n}": v for n, v in {"path": path, **settings}.items()}).model


@contextmanager
def named_as_options() -> Iterator[None]:
    """Inside, refusals of the configuration's section name options and arguments instead.

    Raises:
        UserError: what happens inside raised one.
    """
    try:
        yield
    except UserError as error:
        found = re.match(r"model\.(\w+): ", str(error))
        if found is None or (found[1] != "path" and found[1] not in _OPTIONS):
            raise
        name = "MODEL" if found[1] == "path" else f"--{found[1].replace('_', '-')}"
        raise UserError(f"{name}: {str(error)[found.end() :]}") from error


def model_of(given: str) -> tuple[str, Path | None]:
    """The model that an argument names, and the configuration of the run that it is of, if any.

    Args:
        given: a model, or a run's folder, which stands for the run's model.

    Raises:
        UserError: the run has no model yet.
    """
    folder = Path(given).expanduser().absolute()
    is_model = any((folder / name).is_file() for name in (INDEX_FILE, LORA_FILE))
    if (folder / CONFIG_FILE).is_file() and not is_model:
        if not (folder / MODEL_FOLDER).is_dir():
            raise UserError(
                f"MODEL: the run in {given} has no {MODEL_FOLDER} yet; it is written when the run "
                "ends, or is stopped by Ctrl-C"
            )
        return str(Path(given) / MODEL_FOLDER), folder / CONFIG_FILE
    run = folder.parent / CONFIG_FILE
    return given, run if is_model and folder.name == MODEL_FOLDER and run.is_file() else None


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
        raise UserError(f"{field}: {model} is a file; must be a diffusers folder{_advice(path)}")
    if model[0] in "./~" or not _HUB_NAME.fullmatch(model):
        raise UserError(
            f'{field}: no folder {model}; must be "miniature", a diffusers folder, or a hub name '
            "such as owner/name"
        )
    check_hub(model, field)


def check_sampled(model: str, base_model: str | None) -> None:
    """Refuse a MODEL that cannot be sampled, alone or with the model that its LoRA belongs to.

    Raises:
        UserError: names the argument or the option.
    """
    folder = Path(model).expanduser()
    if (folder / LORA_FILE).is_file():
        base_of_lora(folder, base_model)
        if base_model is None:
            check_checkpoint(folder, "MODEL")
    elif base_model is not None:
        raise UserError(f"--base-model: got {base_model}, but {model} holds no LoRA weights")
    else:
        check_model(model, "MODEL")


def base_of_lora(folder: Path, base_model: str | None) -> str:
    """The model to which a folder's LoRA weights belong: as given, else as they say.

    Raises:
        UserError: it is not there.
    """
    if base_model is not None:
        check_model(base_model, "--base-model")
        return base_model
    file = folder / SAMPLING_FILE
    base = read_json(file, "MODEL").get("base_model") if file.is_file() else None
    if not isinstance(base, str):
        raise UserError(
            f"--base-model: must be given: no base_model in {file} says what the LoRA weights in "
            f"{folder} belong to"
        )
    try:
        check_model(base, f"base_model in {file}")
    except UserError as error:
        raise UserError(f"{error}; --base-model says where it is now") from error
    return base


def _advice(file: Path) -> str:
    """How a single file of weights becomes a folder."""
    if file.suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".gguf"):
        return ""
    if file.suffix == ".safetensors" and any("lora" in name for name in tensor_names(file)):
        return (
            f": put these LoRA weights into one, as {LORA_FILE}, and name their model with "
            "--base-model, or in training model.path and model.lora_path"
        )
    return (
        '. Convert it once, with the pipeline class of its family: python -c "from diffusers '
        f"import StableDiffusionXLPipeline as P; P.from_single_file('{file}')"
        ".save_pretrained('FOLDER')\""
    )


def check_reward_of(field: str, name: str, options: dict[str, Any] | None = None) -> None:
    """`check_reward` and `reach_reward`, their messages led by what the reward was given as.

    Raises:
        UserError: names the field and the reward.
    """
    try:
        check_reward(name, options)
        reach_reward(name, options)
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
