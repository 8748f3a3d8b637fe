"""What a checkpoint's files say, as diffusers' pipeline reads it: with its classes' defaults.

Left out: what one family's pipeline changes or refuses, which stands in the family's file.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from treegrpo.models.components import Components
from treegrpo.models.folder import ConfigFile, ModelError, components, loading


def complete(checkpoint: Components) -> ConfigFile:
    """The components' configurations, with the defaults of their classes where a file is silent.

    `_class_name` is the class that the index names, which is the one that is loaded.
    """
    configs = {name: _complete(checkpoint, name) for name in checkpoint.configs}
    return ConfigFile(checkpoint.configs.path, configs)


def _complete(checkpoint: Components, name: str) -> ConfigFile:
    component, said = checkpoint.component_class(name), checkpoint.configs[name]
    if hasattr(component, "config_class"):  # transformers'
        with loading(said.path):
            values = component.config_class.from_pretrained(said.path.parent).to_dict()
    else:
        parameters = inspect.signature(component.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        values = {**defaults, **said}
    return ConfigFile(said.path, {**values, "_class_name": component.__name__})


def absent_parts(checkpoint: Components, optional: Sequence[str]) -> dict[str, None]:
    """The parts that the pipeline has no default for and the checkpoint does not have, as None.

    Args:
        optional: the parts that the pipeline can do without, beside those that it says itself.

    Raises:
        ModelError: a part without which the pipeline draws nothing.
    """
    pipeline = checkpoint.pipeline_class()
    present = components(checkpoint.index)
    parameters = inspect.signature(pipeline.__init__).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
    absent = [name for name in required if name not in present]
    for name in absent:
        if name not in (*optional, *pipeline._optional_components):
            raise ModelError(
                f"model.path: {checkpoint.index.path} lacks {name!r}; must be given there"
            )
    return dict.fromkeys(absent)


def limit_tokenizers(pipeline: Any) -> None:
    """Keep CLIP's prompts within its encoders' positions, whatever a tokenizer's files say.

    A tokenizer without a configuration has no limit at all.
    """
    for name, tokenizer in pipeline.components.items():
        encoder = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
        positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if name.startswith("tokenizer") and positions and tokenizer.model_max_length > positions:
            tokenizer.model_max_length = positions
            # Some pipelines have taken the first one's limit by now.
            if name == "tokenizer" and hasattr(pipeline, "tokenizer_max_length"):
                pipeline.tokenizer_max_length = positions
