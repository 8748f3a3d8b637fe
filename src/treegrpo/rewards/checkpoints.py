"""What reward models share: where they run, and finding and reading their checkpoints.

Left out: building the models, which each reward's file does; the trained models' checkpoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treegrpo import hub
from treegrpo.errors import UserError, reason

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = ("float32", "bfloat16")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Placement:
    """Where and how a reward model runs: the options that all of them share.

    Raises:
        UserError: an option is not one of the allowed values, or this machine lacks the device.
    """

    device: str = "auto"
    """A torch device, or "auto" for that of the pictures."""
    dtype: str = "float32"
    """The weights' and activations' type, "float32" or "bfloat16"; scores are always float32."""
    batch_size: int = 32
    """Pictures, or prompts, that go through the model at once."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"option dtype: {self.dtype!r} is none of {', '.join(DTYPES)}")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise UserError(f"option batch_size: {self.batch_size!r} is not a positive integer")
        if not isinstance(self.device, str):
            raise UserError(f"option device: got {self.device!r}; must be a string, such as 'cpu'")
        if self.device != "auto":
            from treegrpo.device import usable_device

            usable_device(self.device, "option device")

    def device_for(self, pictures: Tensor) -> torch.device:
        """The device on which these pictures are scored."""
        import torch

        return pictures.device if self.device == "auto" else torch.device(self.device)


def find_checkpoint(
    path: str | None,
    repository: str,
    files: list[str],
    option: str = "path",
    beside: Path | None = None,
) -> Path:
    """The local folder of a checkpoint, downloaded from the Hugging Face hub where that is needed.

    Args:
        path: a local folder or file (then its folder), a hub repository, or None for `repository`.
        files: the names or patterns of the files that the reward wants from a hub repository.
        option: the option that gave `path`, for messages.
        beside: a local folder that these files belong into, for messages.

    Raises:
        UserError: `path` is neither here nor a repository's name, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    wanted = " ".join(f"--include '{name}'" for name in files)
    advice = (
        f"fetch it where there is a connection with `hf download {repository} {wanted} "
        f"--local-dir {beside or 'FOLDER'}`"
    )
    if beside is None:
        advice += f" and set the option {option} to that folder"
    if not isinstance(path, str | None):
        raise UserError(f"option {option}: got {path!r}; must be a folder or a hub name, or null")
    if path is not None:
        local = Path(path).expanduser()
        if local.exists():
            return local if local.is_dir() else local.parent
        if not _HUB_NAME.fullmatch(path):
            raise UserError(
                f"option {option}: {path!r} does not exist; leave it out for the hub's "
                f"{repository}, or {advice}"
            )
    source, problem = path or repository, hub.why_not_there()
    try:
        return Path(snapshot_download(source, allow_patterns=files))
    except Exception as error:  # the hub's client, its transports and the disk have many
        raise UserError(
            f"option {option}: {source!r} {'is no local folder and ' if path else ''}cannot be "
            f"downloaded from the hub ({problem or reason(error)}); {advice}"
        ) from error


def check_nearby(path: Any, repository: str, files: list[str], option: str) -> None:
    """Refuse what `find_checkpoint` would, downloading nothing; a hub that answers may have it.

    Raises:
        UserError: as `find_checkpoint`.
    """
    is_path = path is not None and not (isinstance(path, str) and _HUB_NAME.fullmatch(path))
    is_here = isinstance(path, str) and Path(path).expanduser().exists()
    if not is_here and (is_path or hub.why_not_there()):
        find_checkpoint(path, repository, files, option)


def find_file(path: str | None, repository: str, names: list[str]) -> Path:
    """The file that `path` names, or that of a checkpoint's folder; see `find_checkpoint`.

    There it has one of these names; where it is missing, the path has the first.
    """
    folder = find_checkpoint(path, repository, names)
    if path is not None and Path(path).expanduser().is_file():
        return Path(path).expanduser()
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def read_weights(file: Path, source: str) -> Any:
    """The tensors and plain containers in a torch file, on the CPU.

    Raises:
        UserError: the file is missing or is not such a file. `source` says where to get it.
    """
    import pickle

    import torch

    if not file.is_file():
        raise UserError(f"option path: there is no {file.name} in {file.parent}; it is {source}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"option path: {file} cannot be read as weights ({reason(error)}); it may be "
            f"incomplete; it is {source}"
        ) from error
