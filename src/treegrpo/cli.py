"""The command line: `treegrpo train`, `plan`, `sample`, `evaluate` and `serve-reward`.

Everything that can be refused is refused before torch is imported, so that help and mistakes
answer at once. Errors of the user's are one red line and exit code 2, without a traceback.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from treegrpo import __version__, checkpoint
from treegrpo.config import Config, describe_fields, load_config, parse_yaml, to_yaml
from treegrpo.errors import UserError
from treegrpo.models.folder import (
    INDEX_FILE,
    LORA_FILE,
    SAMPLING_FILE,
    check_checkpoint,
    check_trainable,
    read_json,
)
from treegrpo.plan import PlanError
from treegrpo.plan_command import parse_memory, plan_command
from treegrpo.prompts import load_prompts, load_train_and_held_out
from treegrpo.rewards import RewardError, check_reward
from treegrpo.textfile import read_utf8

app = typer.Typer(
    name="treegrpo",
    help="Online reinforcement learning for diffusion and flow models by tree rollouts.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_OVERRIDE = re.compile(r"[\w.-]+=", re.ASCII)


def main() -> None:
    """Run the command line; the console script and `python -m treegrpo`."""
    try:
        app()
    except (UserError, PlanError, RewardError) as error:
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error}", err=True)
        sys.exit(2)


# The help prints one line per paragraph.
_CONFIG_KEYS = "\n\n".join(
    ["Configuration keys (and defaults):"]
    + [f"[bold]{key}[/bold] ({default}): {text}" for key, default, text in describe_fields()]
)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"treegrpo {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


_ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG.yaml | key.path=value",
        help="A configuration file and changes to it; without any, the miniature job.",
        show_default=False,
    ),
]
_JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here.")
]


@app.command(epilog=_CONFIG_KEYS)
def train(
    arguments: _ConfigArguments = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration and stop.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the output folder.")
    ] = False,
) -> None:
    """Train a model."""
    config = _load_config(arguments or [])
    if print_config:
        typer.echo(to_yaml(config), nl=False)
        return
    _check_train(config, resume=resume, overwrite=overwrite)

    from treegrpo import trainer

    trainer.train(config, resume=resume, overwrite=overwrite)


@app.command()
def plan(
    arguments: _ConfigArguments = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of a device, such as 24GiB: suggest settings that fit."
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes (GPUs) that share the prompts.")
    ] = 1,
    json_file: _JsonFile = None,
) -> None:
    """Say what an iteration takes of forwards and of memory, without reading any weight."""
    config = _load_config(arguments or [])
    limit = None if memory is None else parse_memory(memory)
    _check_model(config.model.path, "model.path", weights=False)
    check_trainable(config.model.path)
    if json_file is not None:
        _check_output(json_file, "--json")

    plan_command(config, memory=limit, processes=processes, json_file=json_file)


_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help='A diffusers folder, a hub name or "miniature".', show_default=False
    ),
]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of the noises.")]
_Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps; the model's own if not given.")
]
_GuidanceScale = Annotated[
    float | None,
    typer.Option(min=0, help="Classifier-free guidance; the model's own if not given."),
]


_DType = Annotated[Literal["float32", "bfloat16"], typer.Option(help="What the models compute in.")]


@app.command()
def sample(
    model: _Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given several times.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help='Prompts from a file or dataset, as in training; or "miniature".'
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="The column with the prompt.")] = "prompt",
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Use only the first so many prompts.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    seed: _Seed = 0,
    steps: _Steps = None,
    guidance_scale: _GuidanceScale = None,
    dtype: _DType = "float32",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.")] = Path(
        "grid.png"
    ),
) -> None:
    """Draw a grid of samples, one row per prompt."""
    if bool(prompt) == bool(prompts):
        raise UserError("prompts: must be given by --prompt or by --prompts, not both")
    loaded = load_prompts(prompts, "held_out", column) if prompts else []
    texts = ([one.text for one in loaded] or list(prompt or []))[:max_prompts]
    _check_model(model, "MODEL")
    _check_output(out, "--out")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: got {out}; the picture is a PNG, so its name must end in .png")

    from treegrpo import evaluate

    evaluate.sample_grid(
        model=model,
        prompts=texts,
        count=count,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        dtype=dtype,
        out=out,
    )


@app.command("evaluate")
def evaluate_(
    model: _Model,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help='What to compare with; "none": nothing.',
            show_default="what an exported model was trained from, else none",
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="A .txt file with one prompt per line, a .jsonl, .json, .csv, .tsv or .parquet "
            'file, or a dataset; "miniature": its held-out prompts.',
        ),
    ] = "miniature",
    column: Annotated[str, typer.Option(help="The column with the prompt.")] = "prompt",
    rewards: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="The rewards, separated by commas.",
            show_default="composition,composition_accuracy for the miniature's prompts",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="One more reward; may be given several times.")
    ] = None,
    reward_options: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Options of rewards, by name, such as {hpsv2: {path: /models/hps}}.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of the noises: 0, 1, ...")] = 1,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Images per prompt and seed.")] = 2,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Use only the first so many prompts.")
    ] = None,
    steps: _Steps = None,
    guidance_scale: _GuidanceScale = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most images sampled at once.")] = 16,
    dtype: _DType = "float32",
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write figures and every prompt's scores here."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE.html", help="Also write a web page with the images side by side."
        ),
    ] = None,
) -> None:
    """Measure a model by rewards, beside the model that it was trained from.

    Both draw every prompt from the same noises.
    """
    loaded = load_prompts(prompts, "held_out", column)[:max_prompts]
    names = _evaluated_rewards(rewards, reward or [], reward_options, prompts)
    _check_model(model, "MODEL")
    if base is None:
        base = _known_base(model)
    elif base == "none":
        base = None
    else:
        _check_model(base, "--base")
    if json_file is not None:
        _check_output(json_file, "--json")
    page_file = None if page is None else _page_file(page)
    if (
        json_file is not None
        and page_file is not None
        and json_file.resolve() == page_file.resolve()
    ):
        raise UserError(f"--json and --page: both got {json_file}; must be two files")

    from treegrpo import evaluate

    evaluate.evaluate_command(
        model=model,
        base=base,
        prompts=loaded,
        source=prompts,
        rewards=names,
        seeds=seeds,
        images_per_prompt=images_per_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        max_batch=max_batch,
        dtype=dtype,
        json_file=json_file,
        page=page_file,
    )


@app.command("serve-reward")
def serve_reward_(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A reward: built in, or module:function or module:Class of your own.",
            show_default=False,
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An option of the reward; may be given several times."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help='The address to listen on; "0.0.0.0" lets other machines in.')
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="VARIABLE", help="Environment variable with a token that clients must send."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most images of one request.")] = 256,
    device: Annotated[
        str, typer.Option(help='Where images go; "auto" is an accelerator if there is one.')
    ] = "auto",
) -> None:
    """Serve a reward to runs on other machines."""
    options: dict[str, Any] = {}
    for text in option or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--option: got {text!r}; must be KEY=VALUE")
        options[key] = parse_yaml(value, f"--option {key}")
    _check_reward(name, "NAME", options)

    from treegrpo.serve_reward import serve

    serve(
        name,
        options,
        host=host,
        port=port,
        token_env=token_env,
        max_batch=max_batch,
        device=device,
    )


# --- what is refused before anything heavy is imported ---


def _load_config(arguments: list[str]) -> Config:
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    paths = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    if len(paths) > 1:
        raise UserError(
            f"got {len(paths)} configuration files ({', '.join(paths)}); must be at most one "
            "(a change to it is written key.path=value)"
        )
    return load_config(Path(paths[0]) if paths else None, overrides)


def _check_train(config: Config, *, resume: bool, overwrite: bool) -> None:
    load_train_and_held_out(
        config.prompts.train,
        config.prompts.held_out,
        held_out_share=config.prompts.held_out_share,
        column=config.prompts.column,
        held_out_column=config.prompts.held_out_column,
    )
    for index, reward in enumerate(config.rewards):
        _check_reward(reward.name, f"rewards.{index}.name", reward.options)
    _check_model(config.model.path, "model.path")
    check_trainable(config.model.path)
    # Of several processes only the first looks: the others may start after it has begun to write.
    if os.environ.get("RANK", "0") == "0":
        checkpoint.check_folder(config, resume=resume, overwrite=overwrite)


def _check_model(model: str, field: str, *, weights: bool = True) -> None:
    path = Path(model).expanduser()
    if path.is_dir():
        check_checkpoint(path, field, weights=weights)
        return
    if model == "miniature":
        return
    if path.exists():
        raise UserError(f"{field}: {model} is a file; must be a diffusers folder")
    looks_like_path = model[0] in "./~" or not _HUB_NAME.fullmatch(model)
    if looks_like_path:
        raise UserError(
            f'{field}: no folder {model}; must be "miniature", a diffusers folder, or a hub name '
            "such as owner/name"
        )


def _known_base(model: str) -> str | None:
    """What an exported model was trained from, as its own folder or its run's says."""
    folder = Path(model).expanduser().absolute()
    run = folder.parent / checkpoint.CONFIG_FILE
    if (folder / LORA_FILE).is_file():
        place = f"base_model in {folder / SAMPLING_FILE}"
        base = read_json(folder / SAMPLING_FILE, "MODEL").get("base_model")
    elif (
        folder.name == checkpoint.MODEL_FOLDER and (folder / INDEX_FILE).is_file() and run.is_file()
    ):
        place = f"model.path in {run} (--base names another)"
        try:
            base = yaml.safe_load(read_utf8(run, "configuration file", UserError))["model"]["path"]
        except (yaml.YAMLError, TypeError, KeyError):
            return None  # not the configuration of a run
    else:
        return None
    if not isinstance(base, str):
        return None
    _check_model(base, place)
    return base


def _evaluated_rewards(
    listed: str | None, single: list[str], options_file: Path | None, prompts: str
) -> dict[str, dict[str, Any]]:
    """Names of the rewards that `evaluate` is asked for, and their options."""
    fields = [(name.strip(), "--rewards") for name in listed.split(",")] if listed else []
    fields += [(name, "--reward") for name in single]
    if not fields:
        if prompts != "miniature":
            raise UserError("--rewards: must be given, such as --rewards clip_score,aesthetic")
        fields = [(name, "--rewards") for name in ("composition", "composition_accuracy")]
    options: dict[str, dict[str, Any]] = {}
    if options_file is not None:
        text = read_utf8(options_file, "--reward-options:", UserError)
        options = parse_yaml(text, f"--reward-options: {options_file}") or {}
        if not isinstance(options, dict) or not all(isinstance(o, dict) for o in options.values()):
            raise UserError(
                f"--reward-options: {options_file} must hold options by reward, such as "
                "{hpsv2: {path: /models/hps}}"
            )
    names = [name for name, _ in fields]
    for name in options:
        if name not in names:
            raise UserError(
                f"--reward-options: {options_file} has options of {name!r}; the rewards are "
                f"{', '.join(names)}"
            )
    for name, field in fields:
        if names.count(name) > 1:
            raise UserError(f"{field}: {name!r} is given {names.count(name)} times")
        _check_reward(name, field, options.get(name))
    return {name: options.get(name, {}) for name in names}


def _check_reward(name: str, field: str, options: dict[str, Any] | None = None) -> None:
    try:
        check_reward(name, options)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


def _check_parent(path: Path, option: str) -> None:
    if not path.parent.is_dir():
        raise UserError(f"{option}: no folder {path.parent} to write {path.name} in")


def _check_output(path: Path, option: str) -> None:
    _check_parent(path, option)
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder; must be a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option}: the folder {path.parent} may not be written to")


def _page_file(page: Path) -> Path:
    if page.suffix.lower() in (".html", ".htm"):
        _check_output(page, "--page")
        return page
    if page.exists() and not page.is_dir():
        raise UserError(f"--page: {page} is a file; must be a folder, or a file named .html")
    file = page / "index.html"
    _check_output(file if page.is_dir() else page, "--page")
    return file
