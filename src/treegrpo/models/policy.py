"""The model, seen from the trainer: the `Policy` interface, and `load_policy`.

A family file (`sd3.py`) says only what differs between families. Families are recognised from the
checkpoint's own `model_index.json`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from treegrpo.models.folder import (
    FAMILIES,
    LORA_FILE,
    SAMPLING_FILE,
    ModelError,
    check_family,
    check_folder,
    read_json,
    resolve,
)
from treegrpo.rollout import Predict
from treegrpo.transition import Schedule


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint wants to be sampled; written beside an exported model as `sampling.json`.

    Attributes:
        steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is none (and half the cost).
        height, width: of the image, in pixels; None is the model's own size.
        max_sequence_length: tokens of the third text encoder (of its zeros where it is absent).
        base_model: for a folder of LoRA weights, the checkpoint that they belong to.
    """

    steps: int = 28
    guidance_scale: float = 4.5
    height: int | None = None
    width: int | None = None
    max_sequence_length: int = 256
    base_model: str | None = None


class Policy(Protocol):
    """What the trainer needs from a text-to-image model."""

    transformer: nn.Module
    sampling: Sampling
    device: torch.device
    forwards: int

    def encode(self, prompts: Sequence[str]) -> Any:
        """Prompts to conditioning, computed once per prompt and kept."""

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Standard normal float32 [count, ...] at the first level, in the model's latent shape."""

    def schedule(self, steps: int) -> Schedule:
        """The checkpoint's own noise levels for so many steps."""

    def predictor(
        self, conditioning: Any, steps: int, transformer: nn.Module | None = None
    ) -> Predict:
        """The model as the algorithm calls it, for these prompts; guidance happens inside.

        `transformer` stands in for the policy's own, for a reference model.
        """

    def decode(self, latents: Tensor, max_batch: int) -> Tensor:
        """Finished latents [rows, ...] to float32 images [rows, 3, height, width] in [0, 1]."""

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str] | None) -> None:
        """Freeze the model and put trainable LoRA weights on it."""

    def load_lora(self, folder: Path) -> None:
        """Put exported LoRA weights on the model, for sampling."""

    def bytes(self) -> int:
        """Memory of all weights."""

    def save(self, folder: Path, base_model: str) -> None:
        """Write what diffusers loads: the whole pipeline, or the LoRA weights alone, which belong
        to `base_model`."""


def load_policy(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Policy:
    """Load a checkpoint: "miniature", a diffusers folder, a folder of LoRA weights or a hub name.

    Args:
        overrides: fields of `Sampling` that replace the checkpoint's own; None keeps them.

    Raises:
        ModelError: the folder is missing or incomplete, or its pipeline class is not supported.
    """
    quiet_libraries()
    from diffusers import DiffusionPipeline

    folder = Path(resolve(path))
    stored = read_json(folder / SAMPLING_FILE) if (folder / SAMPLING_FILE).is_file() else {}
    changes = {name: value for name, value in overrides.items() if value is not None}
    try:
        sampling = Sampling(**{**stored, **changes})
    except TypeError as error:
        raise ModelError(f"model.path: {folder / SAMPLING_FILE}: {error}") from error
    has_lora = (folder / LORA_FILE).is_file()
    source = resolve(sampling.base_model or path) if has_lora else str(folder)
    if Path(source).is_dir():
        check_folder(Path(source))
    try:
        index = DiffusionPipeline.load_config(source)
    except OSError as error:
        raise ModelError(
            f"model.path: cannot load {source!r}: it is neither a folder nor a checkpoint on the "
            f"hub that can be reached from here ({error})"
        ) from error
    module, _, name = FAMILIES[check_family(source, index)].partition(":")
    family = getattr(importlib.import_module(module), name)
    try:
        policy: Policy = family(source, index, sampling, device=device, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: cannot load {source!r}: {error}") from error
    if has_lora:
        policy.load_lora(folder)
    return policy


def quiet_libraries() -> None:
    """Keep diffusers and transformers from mixing progress bars and advice into our own display."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
