"""The command line: its seven commands, the version, and errors.

Errors of the user's are one red line and exit code 2, without a traceback; a run that Ctrl-C ended
has 130. The commands refuse what can be refused before torch is imported, so that help and mistakes
answer at once.

Left out: what the commands are given and do (`commands/`).
"""

import sys
from typing import Annotated

import typer

from treegrpo import __version__
from treegrpo.commands.cache import cache
from treegrpo.commands.compare import compare
from treegrpo.commands.evaluate import evaluate
from treegrpo.commands.plan import plan
from treegrpo.commands.sample import sample
from treegrpo.commands.serve_reward import serve_reward
from treegrpo.commands.train import train
from treegrpo.config import describe_fields
from treegrpo.errors import UserError
from treegrpo.plan import PlanError
from treegrpo.rewards import RewardError

# The help prints one line per paragraph.
_CONFIG_KEYS = "\n\n".join(
    ["Configuration keys (and defaults):"]
    + [f"[bold]{key}[/bold] ({default}): {text}" for key, default, text in describe_fields()]
)

app = typer.Typer(
    name="treegrpo",
    help="Online reinforcement learning for diffusion and flow models by tree rollouts.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(epilog=_CONFIG_KEYS)(train)
for _command in (plan, sample, evaluate, compare, serve_reward, cache):
    app.command()(_command)


def main() -> None:
    """Run the command line; the console script and `python -m treegrpo`."""
    try:
        app(prog_name="treegrpo")
    except (UserError, PlanError, RewardError) as error:
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error}", err=True)
        sys.exit(2)


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
