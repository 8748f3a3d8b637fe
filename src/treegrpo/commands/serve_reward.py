"""`treegrpo serve-reward`: a reward for runs on other machines.

Left out: the server (`rewards/server.py`) and its client (`rewards/remote.py`).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from treegrpo.commands.arguments import check_reward_of
from treegrpo.config import parse_argument
from treegrpo.errors import UserError


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
    options: dict[str, Any] = {}
    for text in option or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--option: got {text!r}; must be KEY=VALUE")
        options[key] = parse_argument(value, f"--option {key}")
    check_reward_of("NAME", name, options)

    from treegrpo.rewards.server import serve

    serve(
        name,
        options,
        host=host,
        port=port,
        token_env=token_env,
        max_batch=max_batch,
        device=device,
    )
