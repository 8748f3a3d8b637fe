"""The state that a run continues from: written whole or not at all, and read back.

Left out: the rest of a run's folder (`run_folder.py`), and what the state holds, which the learner
and the prompts say.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from treegrpo.errors import reason
from treegrpo.run_folder import EARLIER_STATE_FILE, STATE_FILE, RunError


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

    The previous one stays beside it until `prove_state`, because only the next iteration shows
    whether a state is sound; of two that are not proven, the first gives way.

    Raises:
        RunError: the disk is full.
    """
    import torch  # here, so that a refused folder does not wait for it

    partial = folder / (STATE_FILE + ".partial")
    try:
        torch.save(state, partial)
        if (folder / STATE_FILE).exists() and not (folder / EARLIER_STATE_FILE).exists():
            _keep(folder / STATE_FILE, folder / EARLIER_STATE_FILE)
        os.replace(partial, folder / STATE_FILE)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):
            raise
        raise RunError(
            f"output: could not write {folder / STATE_FILE}: {error}; an earlier checkpoint in "
            "this folder, if there is one, is unharmed"
        ) from error


def _keep(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # the disk's format has no second names
        os.replace(path, copy)


def prove_state(folder: Path) -> None:
    """The state is sound: the one before it is not needed any more."""
    (folder / EARLIER_STATE_FILE).unlink(missing_ok=True)


def take_back_state(folder: Path) -> bool:
    """The state is not sound: put the one before it in its place, if that is still there."""
    there = (folder / EARLIER_STATE_FILE).exists()
    if there:
        os.replace(folder / EARLIER_STATE_FILE, folder / STATE_FILE)
    return there


def load_state(folder: Path) -> dict[str, Any]:
    """The state that `save_state` wrote.

    Raises:
        RunError: the file is damaged.
    """
    import pickle

    import torch

    try:
        state: dict[str, Any] = torch.load(
            folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(
            f"output: {folder / STATE_FILE} is damaged and cannot be resumed from ({reason(error)})"
        ) from error
    return state
