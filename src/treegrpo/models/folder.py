"""Checkpoint folders, looked at without heavy imports, so that mistakes answer at once."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from treegrpo.errors import UserError

SAMPLING_FILE = "sampling.json"
INDEX_FILE = "model_index.json"
LORA_FILE = "pytorch_lora_weights.safetensors"

# Pipeline class, as a checkpoint's model_index.json names it, to the policy that trains it.
FAMILIES = {"StableDiffusion3Pipeline": "treegrpo.models.sd3:SD3Policy"}


class ModelError(UserError):
    """A checkpoint that cannot be loaded, or a setting it does not allow."""


def resolve(path: str) -> str:
    """The folder of the embedded checkpoint for "miniature", any other path as it is."""
    if path == "miniature":
        return str(resources.files("treegrpo") / "miniature" / "checkpoint")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def check_folder(folder: Path, field: str = "model.path") -> None:
    """Refuse a folder that is neither a supported diffusers checkpoint nor our LoRA export.

    Raises:
        ModelError: model_index.json is missing, damaged or of an unsupported pipeline class.
    """
    if (folder / LORA_FILE).is_file() and (folder / SAMPLING_FILE).is_file():
        return
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(
            f"{field}: {folder} has no {INDEX_FILE}; it must be a checkpoint in the diffusers "
            f"folder format, or LoRA weights as treegrpo exports them ({LORA_FILE} and "
            f"{SAMPLING_FILE})"
        )
    check_family(str(folder), read_json(folder / INDEX_FILE, field), field)


def check_family(path: str, index: dict[str, Any], field: str = "model.path") -> str:
    """The pipeline class of a checkpoint's index.

    Raises:
        ModelError: it is not supported.
    """
    family = index.get("_class_name")
    if family not in FAMILIES:
        raise ModelError(
            f"{field}: {path!r} is a {family}; supported are {', '.join(sorted(FAMILIES))}"
        )
    return str(family)


def read_json(path: Path, field: str = "model.path") -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: the file cannot be read as one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{field}: {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{field}: {path} must hold a JSON object")
    return data
