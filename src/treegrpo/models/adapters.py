"""LoRA adapters on a policy's network: their targets, fresh ones, trained ones.

Left out: writing them (`export.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from treegrpo.config import ModelConfig
from treegrpo.models.folder import LORA_FILE, ModelError, loading
from treegrpo.models.policy import Policy

_ADAPTER = "default"  # the name that diffusers and peft give the only one


def check_lora_targets(policy: Policy, targets: Sequence[str]) -> None:
    """Refuse names that no layer has, before weights are read; the ModelError has similar ones."""
    layers = [
        name
        for name, module in policy.checkpoint.without_weights(policy.network_name).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    ]
    # Blocks are alike: their names without numbers, each once.
    kinds = list(dict.fromkeys(re.sub(r"^.*\.\d+\.(?=[a-z])", "", name) for name in layers))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            near = difflib.get_close_matches(target, kinds, n=3, cutoff=0.3) or kinds[:5]
            raise ModelError(
                f"model.lora_targets: got {target!r}, which no linear or convolutional layer "
                f"of the {policy.network_name} is named; there are {', '.join(near)}, ..."
            )


def add_lora(policy: Policy, model: ModelConfig) -> None:
    """Freeze the network and put trainable float32 LoRA weights on it.

    Raises:
        ModelError: peft has no adapter for a target.
    """
    from peft import LoraConfig

    network: Any = policy.network
    network.requires_grad_(False)
    targets = list(model.lora_targets or policy.lora_targets)
    adapter = LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha or 2 * model.lora_rank,
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    try:
        network.add_adapter(adapter, _ADAPTER)
    except ValueError as error:
        raise ModelError(
            f"model.lora_targets: got {targets} with lora_rank {model.lora_rank}, on which no "
            f"adapter can be put: {error}"
        ) from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_lora(policy: Policy, folder: Path) -> None:
    """Put exported LoRA weights on the network, for sampling; ModelError: they do not fit it."""
    network: Any = policy.network
    with loading(folder):
        network.load_lora_adapter(str(folder), prefix=policy.network_name, weight_name=LORA_FILE)


def has_lora(policy: Policy) -> bool:
    """Whether the network has adapters of `add_lora`."""
    return _ADAPTER in getattr(policy.network, "peft_config", {})


def lora_weights(policy: Policy) -> dict[str, Any]:
    """The adapters' weights by diffusers' names, times alpha / rank, which loaders take to be 1."""
    from peft.utils import get_peft_model_state_dict

    network: Any = policy.network
    config = network.peft_config[_ADAPTER]
    return {
        name: weight * (config.lora_alpha / config.r) if ".lora_B." in name else weight
        for name, weight in get_peft_model_state_dict(network).items()
    }
