"""A run's folder and its state on disk: atomic save, exact resume, and refusal of both mistakes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from treegrpo.config import Config, to_yaml
from treegrpo.errors import UserError

STATE_FILE = "checkpoint.pt"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"

# What may differ between a run and its continuation.
_FREE = {
    ("output",),
    ("train", "time_limit_minutes"),
    ("train", "save_every"),
    ("evaluation", "every"),
    ("rollout", "max_batch"),
    ("train", "micro_batch"),
}


class RunError(UserError):
    """A run's folder that cannot be used as asked."""


def check_folder(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that cannot be used as asked; changes nothing.

    Raises:
        RunError: the folder holds something and neither `resume` nor `overwrite` was given; it
            holds something that is no run; there is nothing to resume; or the run to resume was
            made with other settings.
    """
    folder = config.output
    if resume and overwrite:
        raise RunError("--resume and --overwrite: give one of them")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"output: {folder} is a file; must be a folder")
    if resume:
        if not (folder / STATE_FILE).is_file():
            raise RunError(f"output: {folder} holds no run to resume (no {STATE_FILE})")
        _check_same_settings(folder, config)
    elif folder.is_dir() and not _is_unused(folder):
        if not (folder / CONFIG_FILE).is_file():
            raise RunError(
                f"output: {folder} is not empty and holds no run, so nothing in it is "
                "replaced; choose another folder with output=FOLDER"
            )
        if not overwrite:
            raise RunError(
                f"output: {folder} already holds a run; continue it with --resume, replace "
                "it with --overwrite, or choose another folder with output=FOLDER"
            )


def _is_unused(folder: Path) -> bool:
    """Whether nothing is there, or a run that ended before its first iteration."""
    results = (STATE_FILE, METRICS_FILE, EVALUATIONS_FILE)
    is_run = (folder / CONFIG_FILE).is_file()
    return not any(folder.iterdir()) or (
        is_run and not any((folder / name).exists() for name in results)
    )


def prepare_folder(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Make the run's folder (anew with `overwrite`) and write its configuration.

    Raises:
        RunError: as `check_folder`.
    """
    check_folder(config, resume=resume, overwrite=overwrite)
    if config.output.is_dir() and not resume:
        shutil.rmtree(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / CONFIG_FILE, to_yaml(config))


def _check_same_settings(folder: Path, config: Config) -> None:
    before = _flatten(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    now = _flatten(yaml.safe_load(to_yaml(config)))
    free = set(_FREE)
    if config.train.learning_rate_schedule == "constant":
        free.add(("train", "iterations"))  # otherwise they decide every step's learning rate
    changed = [
        f"{'.'.join(key)}: was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*before, *now}, key=str)
        if before.get(key) != now.get(key) and key not in free
    ]
    if changed:
        raise RunError(
            f"output: the run in {folder} was made with other settings; to resume, keep "
            "them\n  " + "\n  ".join(changed)
        )


def _flatten(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, (*prefix, name))
        else:
            flat[(*prefix, name)] = value
    return flat


def check_space(folder: Path, needed: int) -> None:
    """Refuse a run whose checkpoint would not fit.

    Args:
        needed: bytes.

    Raises:
        RunError: the disk has less free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise RunError(
            f"output: {folder} has {free / 2**20:,.0f} MiB free, but the checkpoint and the "
            f"trained model need about {needed / 2**20:,.0f} MiB; free some space or choose "
            "another folder with output=FOLDER"
        )


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the run's state at once: a crash or a full disk leaves the previous one whole.

    Raises:
        RunError: the disk is full.
    """
    import torch  # here, so that a refused folder does not wait for it

    partial = folder / (STATE_FILE + ".partial")
    try:
        torch.save(state, partial)
        os.replace(partial, folder / STATE_FILE)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise RunError(
            f"output: could not write {folder / STATE_FILE}: {error}; an earlier checkpoint in "
            "this folder, if there is one, is unharmed"
        ) from error


def load_state(folder: Path) -> dict[str, Any]:
    """The state that `save_state` wrote."""
    import torch

    state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    return state


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def drop_lines_from(path: Path, iteration: int) -> None:
    """Forget records of iterations that a resumed run will repeat."""
    kept = [record for record in read_lines(path) if record["iteration"] < iteration]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
