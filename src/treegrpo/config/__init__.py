"""The configuration: what keys there are, reading them, and problems with them in words.

Left out: the sections of the methods (`methods/settings.py`).
"""

from treegrpo.config.reading import (
    changed,
    has_setting,
    load_config,
    method_in,
    parse_argument,
    parse_yaml,
    to_yaml,
)
from treegrpo.config.recipes import ABLATIONS, RECIPES, configuration_file, variants_file
from treegrpo.config.schema import (
    Config,
    EvaluationConfig,
    ModelConfig,
    PromptsConfig,
    RewardConfig,
    TrainConfig,
    method_of,
)
from treegrpo.config.wording import ConfigError, describe_fields

__all__ = [
    "ABLATIONS",
    "RECIPES",
    "Config",
    "ConfigError",
    "EvaluationConfig",
    "ModelConfig",
    "PromptsConfig",
    "RewardConfig",
    "TrainConfig",
    "changed",
    "configuration_file",
    "describe_fields",
    "has_setting",
    "load_config",
    "method_in",
    "method_of",
    "parse_argument",
    "parse_yaml",
    "to_yaml",
    "variants_file",
]
