"""The command line's options and help, and its errors.

Errors of the user's are one red line and exit code 2, without a traceback. The commands refuse
what can be refused before torch is imported, so that help and mistakes answer at once.

Left out: what the options mean and do (`commands/`).
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from treegrpo import __version__
from treegrpo.commands.evaluate import evaluate_command
from treegrpo.commands.plan import plan_command
from treegrpo.commands.sample import sample_command
from treegrpo.commands.serve_reward import serve_reward_command
from treegrpo.commands.train import train_command
from treegrpo.config import describe_fields
from treegrpo.errors import UserError
from treegrpo.plan import PlanError
from treegrpo.rewards import RewardError

app = typer.Typer(
    name="treegrpo",
    help="Online reinforcement learning for diffusion and flow models by tree rollouts.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    train_command(arguments or [], print_config=print_config, resume=resume, overwrite=overwrite)


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
    plan_command(arguments or [], memory=memory, processes=processes, json_file=json_file)


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
    sample_command(
        model,
        prompt=prompt or [],
        prompts=prompts,
        column=column,
        max_prompts=max_prompts,
        count=count,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        dtype=dtype,
        out=out,
    )


@app.command()
def evaluate(
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
    evaluate_command(
        model,
        base=base,
        prompts=prompts,
        column=column,
        rewards=rewards,
        reward=reward or [],
        reward_options=reward_options,
        seeds=seeds,
        images_per_prompt=images_per_prompt,
        max_prompts=max_prompts,
        steps=steps,
        guidance_scale=guidance_scale,
        max_batch=max_batch,
        dtype=dtype,
        json_file=json_file,
        page=page,
    )


@app.command()
def serve_reward(
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
    serve_reward_command(
        name,
        option=option or [],
        host=host,
        port=port,
        token_env=token_env,
        max_batch=max_batch,
        device=device,
    )
