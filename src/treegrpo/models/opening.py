"""A checkpoint and the configuration's `model` section, opened as a `Policy`.

`open_policy` reads configurations and refuses what can be refused, `load_weights` reads the
weights. Training, evaluation and the memory estimate all come through here.

Left out: choosing a device (`treegrpo/device.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from treegrpo.config import ModelConfig
from treegrpo.models.adapters import (
    add_lora,
    check_lora,
    check_lora_start,
    check_lora_targets,
    load_lora,
    start_lora,
)
from treegrpo.models.cache import cache_folder
from treegrpo.models.components import Components
from treegrpo.models.folder import (
    FAMILIES,
    LORA_FILE,
    SAMPLING_FILE,
    ModelError,
    check_checkpoint,
    check_family,
    check_full_training,
    check_hub,
    check_trainable,
    download,
    read_json,
    resolve,
)
from treegrpo.models.policy import Policy, Sampling
from treegrpo.models.switches import (
    check_attention_backend,
    check_attention_choice,
    quiet_libraries,
    switch_on,
)

# A component's name and the dtype of its weights to the component.
Read = Callable[[str, torch.dtype], nn.Module]

_SAMPLING_FIELDS = [field.name for field in fields(Sampling)]
# Of a hub's checkpoint, where its weights are not needed.
_CONFIG_FILES = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]


def open_policy(
    model: ModelConfig,
    *,
    device: torch.device,
    steps: int | None = None,
    weights: bool = True,
    base_model: str | None = None,
) -> Policy:
    """A policy whose checkpoint and settings are checked: all but its network and decoder.

    Args:
        model: its sampling settings replace the checkpoint's own; its device is not looked at.
        steps: of the schedule; None: the checkpoint's own.
        weights: whether they must be there; otherwise a hub's checkpoint is not downloaded but for
            its configurations.
        base_model: what a folder of LoRA weights belongs to; None: what it says itself.

    Raises:
        ModelError: the folder is missing or incomplete, its pipeline class is not supported, or a
            setting is not allowed.
    """
    quiet_libraries()
    if model.attention_backend is not None:
        check_attention_backend(model.attention_backend)
    folder = Path(resolve(model.path))
    stored = _stored_sampling(folder / SAMPLING_FILE)
    lora_folder = folder if (folder / LORA_FILE).is_file() else None
    base = str(folder)
    if lora_folder is not None:
        base = resolve(base_model or stored.get("base_model") or model.path)
    source = _local_folder(base, weights)
    if lora_folder is not None and not (lora_folder / SAMPLING_FILE).is_file():
        stored = _stored_sampling(source / SAMPLING_FILE)
    check_checkpoint(source, weights=weights)
    checkpoint = Components.of(source, lora_folder)
    module, _, name = FAMILIES[check_family(str(source), checkpoint.index)].partition(":")
    family: type[Policy] = getattr(importlib.import_module(module), name)
    given = {name: getattr(model, name, None) for name in _SAMPLING_FIELDS} | {"steps": steps}
    changes = {name: value for name, value in given.items() if value is not None}
    sampling = Sampling(
        **{**asdict(family.default_sampling(checkpoint.configs)), **stored, **changes}
    )
    cache = None if model.embedding_cache is None else cache_folder(model.embedding_cache)
    dtype = getattr(torch, model.dtype)
    limit = model.embedding_cache_gib
    most = None if limit is None else limit * 2**30
    policy = family(checkpoint, sampling, device=device, dtype=dtype, cache=cache, cache_bytes=most)
    if lora_folder is not None and weights:
        check_lora(policy, lora_folder / LORA_FILE)
    if model.lora_path is not None and weights:
        check_lora_start(policy, model)
    if model.lora_targets:
        check_lora_targets(policy, model.lora_targets)
    if model.attention_backend is not None:
        check_attention_choice(policy, model.attention_backend)
    return policy


def load_weights(
    policy: Policy, model: ModelConfig, *, train: bool, read: Read | None = None
) -> None:
    """Give a policy its network and decoder, with what the section switches on.

    Args:
        model: the section that the policy was opened with.
        train: for training: the weights to train are float32 whatever the network computes in, and
            with a LoRA rank they are adapters, fresh or as given. For sampling, an export's
            adapters are put on.
        read: gives the components; None: reads them from the checkpoint to the policy's device.

    Raises:
        ModelError: weights cannot be read or are missing, or adapters alone are there to train.
    """
    if train:
        check_trainable(model.path)
    all_trained, is_read = train and not model.lora_rank, read is None
    if all_trained and is_read:
        check_full_training(policy.checkpoint.folder)
    read = read or partial(policy.checkpoint.read, device=policy.device)
    policy.network = read(policy.network_name, torch.float32 if all_trained else policy.dtype)
    if policy.checkpoint.lora_folder is not None:
        load_lora(policy, policy.checkpoint.lora_folder / LORA_FILE)
    policy.vae = read("vae", policy.dtype).requires_grad_(False).eval()
    # Two-dimensional convolutions run up to twice as fast with the channels last.
    if all(parameter.dim() < 5 for parameter in policy.vae.parameters()):
        policy.vae.to(memory_format=torch.channels_last)
    if train and model.lora_rank:
        add_lora(policy, model)
        if model.lora_path is not None and is_read:
            start_lora(policy, model)
    switch_on(policy, model)
    policy.network.eval()  # no dropout: the ratio compares the same function


def load_policy(model: ModelConfig, *, device: torch.device, steps: int | None = None) -> Policy:
    """`open_policy` with its weights read, for sampling."""
    policy = open_policy(model, device=device, steps=steps)
    load_weights(policy, model, train=False)
    return policy


def _stored_sampling(file: Path) -> dict[str, Any]:
    """What a checkpoint's `sampling.json` says, if it has one."""
    if not file.is_file():
        return {}
    stored = read_json(file)
    unknown = sorted(set(stored) - set(_SAMPLING_FIELDS))
    if unknown:
        raise ModelError(f"model.path: {file} has an unknown key {unknown[0]!r}")
    try:
        TypeAdapter(Sampling).validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ModelError(
            f"model.path: {file}: {'.'.join(map(str, wrong['loc']))}: got {wrong['input']!r}; "
            f"{wrong['msg']}"
        ) from None
    return stored


def _local_folder(source: str, weights: bool) -> Path:
    """The checkpoint on this machine, downloaded if it is a hub name."""
    if Path(source).is_dir():
        return Path(source)
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    check_hub(source)  # before its hundred gigabytes are downloaded
    if weights:
        return Path(download(source, DiffusionPipeline.download))
    return Path(download(source, snapshot_download, allow_patterns=_CONFIG_FILES))
