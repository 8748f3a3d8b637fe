"""The components of a checkpoint: their classes, and the modules with or without weights.

Left out: which component is for what (`policy.py`), and pipelines of text encoders (`text.py`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from treegrpo.models.folder import (
    INDEX_FILE,
    ConfigFile,
    ModelError,
    component_configs,
    components,
    loading,
    read_json,
)


@dataclass(frozen=True)
class Components:
    """A checkpoint on disk in the diffusers format.

    Attributes:
        index: its `model_index.json`.
        configs: the configuration of each network and of the scheduler, by component.
        lora_folder: of LoRA weights that belong on the network.
    """

    folder: Path
    index: ConfigFile
    configs: ConfigFile
    lora_folder: Path | None = None

    @staticmethod
    def of(folder: Path, lora_folder: Path | None = None) -> Components:
        """Those of a folder, of which the configurations are read."""
        index = read_json(folder / INDEX_FILE)
        return Components(folder, index, component_configs(folder, index), lora_folder)

    @property
    def text_parts(self) -> list[str]:
        """The text encoders and the tokenizers."""
        return [name for name in components(self.index) if name.startswith(("text_", "tokenizer"))]

    def component_class(self, name: str) -> Any:
        """The class that the index names for a component; ModelError: it cannot be imported."""
        value = self.index[name]
        with loading(self.folder / name):
            library, class_name = value
            return getattr(importlib.import_module(library), class_name)

    def pipeline_class(self) -> Any:
        """The diffusers pipeline of the checkpoint."""
        return getattr(importlib.import_module("diffusers"), self.index["_class_name"])

    def scheduler(self) -> Any:
        """The checkpoint's scheduler; ModelError: diffusers refuses its configuration."""
        scheduler_class = self.component_class("scheduler")
        with loading(self.folder / "scheduler"):
            return scheduler_class.from_pretrained(self.folder, subfolder="scheduler")

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A network, decoder or text encoder with its weights.

        Raises:
            ModelError: they cannot be read, or some are missing, which would stay random.
        """
        module_class = self.component_class(name)
        with loading(self.folder / name):
            module, report = module_class.from_pretrained(
                self.folder, subfolder=name, dtype=dtype, output_loading_info=True
            )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(
                f"model.path: the weights in {self.folder / name} lack {len(missing)} of those of "
                f"{type(module).__name__}, among them {missing[0]!r}"
            )
        with loading(self.folder / name):
            result: nn.Module = module.to(device)
        return result

    def without_weights(self, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A component on the meta device, with the dtypes that `read` gives its parameters."""
        module_class: Any = self.component_class(name)
        config = dict(self.configs[name])
        is_transformers = hasattr(module_class, "config_class")
        with loading(self.folder / name), torch.device("meta"):
            if is_transformers:
                module: nn.Module = module_class(module_class.config_class.from_dict(config))
            else:
                module = module_class.from_config(config)
        strict = "_strict" if is_transformers else ""  # its other list is about float16 alone
        kept = set(getattr(module_class, f"_keep_in_fp32_modules{strict}", None) or ())
        for key, parameter in module.named_parameters():
            if not kept & set(key.split(".")):
                parameter.data = parameter.data.to(dtype)
        return module
