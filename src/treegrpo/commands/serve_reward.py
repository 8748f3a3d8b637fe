"""`treegrpo serve-reward`: a reward for runs on other machines.

Left out: the server (`rewards/server.py`) and its client (`rewards/remote.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treegrpo.commands.arguments import check_reward_of
from treegrpo.config import parse_yaml
from treegrpo.errors import UserError


def serve_reward_command(
    name: str,
    *,
    option: Sequence[str],
    host: str,
    port: int,
    token_env: str | None,
    max_batch: int,
    device: str,
) -> None:
    """Serve a reward until it is stopped.

    Args:
        name: as in a configuration.
        option: the reward's options, each as KEY=VALUE with a value in YAML.
        host: as `serve` takes it.
        port: as `serve` takes it.
        token_env: as `serve` takes it.
        max_batch: as `serve` takes it.
        device: as `serve` takes it.

    Raises:
        UserError: the reward, an option, the token, the device or the address cannot be used.
    """
    options: dict[str, Any] = {}
    for text in option:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"--option: got {text!r}; must be KEY=VALUE")
        options[key] = parse_yaml(value, f"--option {key}")
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
