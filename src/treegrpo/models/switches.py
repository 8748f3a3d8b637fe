"""What diffusers offers to save memory or time, switched on as configured.

None of it changes what is computed, but for rounding and, at the seams of large images, tiling.

Left out: precision (`Policy.dtype`), offload and batch sizes, which belong to the rollout.
"""

from __future__ import annotations

import importlib
from typing import Any

from treegrpo.config import ModelConfig
from treegrpo.models.folder import ModelError
from treegrpo.models.policy import Policy


def check_attention_backend(name: str) -> None:
    """Refuse, with a ModelError, a backend that diffusers does not know or cannot run here."""
    from diffusers.models import attention_dispatch

    names = [backend.value for backend in attention_dispatch.AttentionBackendName]
    if name not in names:
        raise ModelError(
            f"model.attention_backend: got {name!r}; must be one of {', '.join(names)}"
        )
    try:
        attention_dispatch._check_attention_backend_requirements(
            attention_dispatch.AttentionBackendName(name)
        )
    except RuntimeError as error:
        raise ModelError(f"model.attention_backend: got {name!r}: {error}") from error


def check_attention_choice(policy: Policy, name: str) -> None:
    """Refuse an attention backend, with a ModelError, for a network that has no choice."""
    network = policy.checkpoint.without_weights(policy.network_name)
    processors = [getattr(module, "processor", None) for module in network.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ModelError(
            f"model.attention_backend: got {name!r}; the {policy.network_name} of "
            f"{policy.pipeline_name} has no choice, so it must be null"
        )


def switch_on(policy: Policy, model: ModelConfig) -> None:
    """Gradient checkpointing, attention backend, compilation and tiling, where configured."""
    network: Any = policy.network
    if model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if model.attention_backend is not None:
        network.set_attention_backend(model.attention_backend)
    if model.compile:
        if getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks()
        else:
            network.compile()
    if model.vae_tiling:
        policy.vae.enable_tiling()


def quiet_libraries() -> None:
    """Keep diffusers and transformers from mixing progress bars and advice into our own display."""
    for library in ("transformers", "diffusers"):
        logging = importlib.import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
