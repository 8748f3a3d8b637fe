"""`treegrpo train`: what can be refused before torch is imported, then the training.

Left out: the training itself (`training/loop.py`).
"""

from __future__ import annotations

import os

from treegrpo.commands.arguments import check_model, check_reward_of, read_config
from treegrpo.config import Config, method_of, to_yaml
from treegrpo.models.folder import check_trainable
from treegrpo.prompts import load_train_and_held_out
from treegrpo.run_folder import check_run_folder
from treegrpo.tracking import check_trackers


def train_command(
    arguments: list[str], *, print_config: bool, resume: bool, overwrite: bool
) -> None:
    """Train as configured, or print the whole configuration.

    Raises:
        UserError: something cannot be used; nothing was done.
        RewardError: a reward failed.
    """
    config = read_config(arguments)
    if print_config:
        print(to_yaml(config), end="")
        return
    _check(config, resume=resume, overwrite=overwrite)

    from treegrpo.training.loop import train

    train(config, resume=resume, overwrite=overwrite)


def _check(config: Config, *, resume: bool, overwrite: bool) -> None:
    method_of(config).checked_plans(config.train.iterations)
    check_trackers(config.tracking)
    load_train_and_held_out(config.prompts)
    for index, reward in enumerate(config.rewards):
        check_reward_of(f"rewards.{index}.name", reward.name, reward.options)
    check_model(config.model.path, "model.path")
    check_trainable(config.model.path)
    # Of several processes only the first looks: the others may start after it has begun to write.
    if os.environ.get("RANK", "0") == "0":
        check_run_folder(config, resume=resume, overwrite=overwrite)
