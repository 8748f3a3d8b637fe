"""Which device to work on, and how much of its memory is free.

Left out: several processes, each with a device of its own (`training/engine.py`).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from treegrpo.errors import UserError, reason

if TYPE_CHECKING:
    import torch


def default_device() -> torch.device:
    """The accelerator that torch sees, or the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def parse_device(name: str, field: str) -> torch.device:
    """A torch device by its name, whether this machine has it or not; "auto" is the default one.

    Raises:
        UserError: names the field and the name.
    """
    import torch

    if name == "auto":
        return default_device()
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"{field}: got {name!r}; must be 'auto', 'cpu' or another torch device, such as "
            "'cuda' or 'cuda:1'"
        ) from error


def usable_device(name: str, field: str) -> torch.device:
    """`parse_device`, of a device that works here.

    Raises:
        UserError: it does not, or as `parse_device`.
    """
    import torch

    device = parse_device(name, field)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"{field}: got {name!r}, which cannot be used here ({reason(error)}); must be 'auto', "
            "'cpu' or a device of this machine, such as 'cuda:0'"
        ) from error
    if device.type == "meta":
        raise UserError(f"{field}: got {name!r}, which computes nothing; must be a real device")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of a device's memory.

    The CPU's is shared by the processes of a launch; a control group, such as a container's, may
    have less than the machine.
    """
    import torch

    module = torch.get_device_module(device)
    if device.type != "cpu" and hasattr(module, "mem_get_info"):
        reserved = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + reserved)
    free, group = int(psutil.virtual_memory().available), Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
        files = int(dict(line.split() for line in lines)["inactive_file"])  # given back when needed
        free = min(free, most - used + files)
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
