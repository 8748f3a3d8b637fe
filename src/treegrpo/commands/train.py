"""`treegrpo train`: what can be refused before torch is imported, then the training.

Left out: the training itself (`training/loop.py`).
"""

from __future__ import annotations

import os
from collections.abc import Set
from typing import Annotated

import typer

from treegrpo.commands.arguments import (
    INTERRUPTED,
    ConfigArguments,
    check_model,
    check_reward_of,
    read_config,
)
from treegrpo.config import Config, method_of, to_yaml
from treegrpo.errors import Problems
from treegrpo.methods.method import transition_kind
from treegrpo.models.folder import check_trainable, is_diffusion, lora_file
from treegrpo.plan import PlanError
from treegrpo.prompts import load_train_and_held_out
from treegrpo.run_folder import check_is_folder, check_run_folder
from treegrpo.tracking import check_trackers


def train(
    arguments: ConfigArguments = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration and stop.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in the output folder, or in the folder RUN."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the output folder.")
    ] = False,
) -> None:
    """Train a model.

    The first Ctrl-C ends the run after its iteration, with what was trained evaluated and saved;
    the second one ends it at once. Either way the exit code is 130, and --resume continues.
    A setting, file or reward that cannot be used gives 2.
    """
    problems = Problems()
    config, faulty = read_config(arguments, problems)
    if print_config:
        problems.refuse()
        print(to_yaml(config), end="")
        return
    _check(config, faulty, problems, resume=resume, overwrite=overwrite)

    from treegrpo.training import loop

    try:
        interrupted = loop.train(config, resume=resume, overwrite=overwrite).interrupted
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _check(
    config: Config, faulty: Set[str], problems: Problems, *, resume: bool, overwrite: bool
) -> None:
    """Refuse, all together, what can be seen so far; of faulty sections what depends on no key."""
    if not faulty & {"rollout", "train"}:
        with problems.collecting(PlanError):
            method_of(config).checked_plans(config.train.iterations)
            transition_kind(config.rollout, is_flow=not is_diffusion(config.model.path))
    with problems.collecting():
        check_trackers(config.tracking)
    with problems.collecting():
        load_train_and_held_out(config.prompts)
    with problems.collecting():
        check_model(config.model.path, "model.path")
        check_trainable(config.model.path, in_full=not config.model.lora_rank)
    if config.model.lora_path is not None:
        with problems.collecting():
            lora_file(config.model.lora_path)
    for index, reward in enumerate(config.rewards):
        with problems.collecting():
            check_reward_of(f"rewards.{index}.name", reward.name, reward.options)
    # Where there are several processes, the others may start after the first has begun to write.
    if os.environ.get("RANK", "0") == "0" and "output" not in faulty:
        with problems.collecting():
            if faulty:  # whether the run there can go on depends on all keys
                check_is_folder(config.output)
            else:
                check_run_folder(config, resume=resume, overwrite=overwrite)
    problems.refuse()
