"""TreeGRPO: online reinforcement learning for diffusion and flow models by tree rollouts.

Left out: the algorithm, which is imported from its own files, such as `treegrpo.rollout`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that `import treegrpo` and the command line's help stay free of torch.
_EXPORTS = {
    "Config": "treegrpo.config",
    "ConfigError": "treegrpo.config",
    "load_config": "treegrpo.config",
    "UserError": "treegrpo.errors",
    "RolloutPlan": "treegrpo.plan",
    "Prompt": "treegrpo.prompts",
    "load_prompts": "treegrpo.prompts",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
