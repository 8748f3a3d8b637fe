"""The configuration of a training run: one typed tree, its YAML and its errors.

Every field carries a sentence, from which the command line's help is made. Nothing here looks at
the disk (apart from the configuration file itself) or imports torch, so that a wrong
configuration is refused at once.
"""

import copy
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from treegrpo.errors import UserError
from treegrpo.textfile import read_utf8

Method = Literal["tree_grpo", "flow_grpo", "dance_grpo", "mix_grpo", "branch_grpo", "ddpo"]
Transition = Literal["flow_sde", "dance_sde", "cps", "ddim"]
WindowSchedule = Literal["random", "shifting", "fixed"]
Backup = Literal["logprob", "uniform", "sibling"]
AdvantageStd = Literal["group", "global", "none"]
LogProbReduction = Literal["mean", "sum"]

_Number = TypeVar("_Number", int, float)
AtLeastZero = Annotated[_Number, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Name = Annotated[str, Field(min_length=1)]


class ConfigError(UserError):
    """The configuration cannot be used; the message lists every problem, one per line."""


class _Section(BaseModel):
    # Strict: "3", 3.0 and true are not integers. Defaults are validated too, because a default
    # may contradict a field that the user did set.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class ModelConfig(_Section):
    """The policy that is trained."""

    path: Name = "miniature"
    """The model: "miniature" (embedded), a diffusers folder, or a Hugging Face hub name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; trained weights, transitions and log-probabilities are float32 in
    any case."""
    device: Name = "auto"
    """The torch device, such as "cpu" or "cuda:1"; "auto" takes an accelerator if there is one."""
    guidance_scale: AtLeastZero[float] | None = None
    """Guidance in rollouts, updates and evaluation, 1 is none; null: the model's own."""
    negative_prompt: str | None = None
    """What classifier-free guidance leads away from; null: the model's own."""
    height: AtLeastOne | None = None
    """Image height in pixels; null: the model's own."""
    width: AtLeastOne | None = None
    """Image width in pixels; null: the model's own."""
    frames: AtLeastOne | None = None
    """Frames of a video; null: the model's own."""
    max_sequence_length: AtLeastOne | None = None
    """Prompt length in tokens, where the model's text encoder has a choice; null: its own."""
    embedding_cache: Name | None = "auto"
    """Folder of prompt embeddings, which are computed once, after which the text encoders leave
    memory; "auto": treegrpo in the user's cache folder; null: encoders and embeddings in memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, a third more time."""
    compile: bool = False
    """Compile the model's repeated blocks: minutes at the start, faster afterwards."""
    attention_backend: Name | None = None
    """An attention implementation of diffusers, such as "flash" or "_native_cudnn"; null: its
    default."""
    vae_tiling: bool = False
    """Decode large images in tiles: less memory, faint seams."""
    lora_rank: AtLeastZero[int] = 0
    """Rank of the trained LoRA adapters; 0 trains all weights."""
    lora_alpha: Positive | None = None
    """LoRA scale before division by the rank; null: twice the rank."""
    lora_targets: Annotated[list[Name], Field(min_length=1)] | None = None
    """Names of the layers that get an adapter; null: the attention layers of the model's family."""


class RolloutConfig(_Section):
    """How the samples of a prompt are grown."""

    method: Method = "tree_grpo"
    """The plan: which steps are stochastic and where the samples branch."""
    steps: AtLeastOne = 10
    """Denoising steps of a sample."""
    trees: AtLeastOne = 1
    """Independent initial noises per prompt (tree_grpo)."""
    branching: AtLeastOne = 3
    """Children of a node at each branching step (tree_grpo, branch_grpo)."""
    group_size: AtLeastOne = 27
    """Samples per prompt of the methods without branching."""
    window_size: AtLeastOne = 3
    """Consecutive stochastic, trained steps (tree_grpo, mix_grpo)."""
    window_schedule: WindowSchedule = "random"
    """How the window's first step is chosen each iteration."""
    window_start: AtLeastZero[int] = 0
    """The window's first step under the fixed schedule."""
    window_decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Random schedule: each later start is this many times as likely; 1 is uniform."""
    shift_by: AtLeastOne = 1
    """Shifting schedule: steps by which the window advances."""
    shift_every: AtLeastOne = 25
    """Shifting schedule: iterations between two advances."""
    split_steps: Annotated[list[AtLeastZero[int]], Field(min_length=1)] | None = None
    """The branching steps of branch_grpo, which alone has them; null: chosen by the method."""
    deterministic_final_step: bool = False
    """Make the last step deterministic in the methods that train every step; cps and ddim need it
    where the schedule ends at sigma 0, so that their last step adds no noise."""
    transition: Transition = "flow_sde"
    """The stochastic step; ddim is for diffusion models, flow_sde and dance_sde for flow models."""
    noise_level: AtLeastZero[float] = 0.7
    """Strength of the stochastic step's noise."""
    max_leaves: AtLeastOne = 512
    """Most samples per prompt that a configuration may ask for: a guard against a slip."""
    max_batch: AtLeastOne = 512
    """Most samples in one forward pass of a rollout."""
    decode_batch: AtLeastOne | None = None
    """Most samples decoded at once; null: max_batch."""
    prompts_per_batch: AtLeastOne | None = None
    """Prompts sampled together; a batch's images are scored by servers while the next batch is
    sampled; null: all of a process's prompts."""
    offload: bool = False
    """Keep states and images in the CPU's memory, so that the device's does not grow with their
    number."""
    prompts_per_iteration: AtLeastOne = 16
    """Prompts, each with a group of samples, per iteration."""

    @field_validator("window_size")
    @classmethod
    def _window_fits(cls, window_size: int, info: ValidationInfo) -> int:
        method, steps = info.data.get("method"), info.data.get("steps")
        if method in ("tree_grpo", "mix_grpo") and steps is not None and window_size > steps:
            raise _problem(window_size, f"must be at most rollout.steps ({steps})")
        return window_size

    @field_validator("window_start")
    @classmethod
    def _fixed_window_fits(cls, window_start: int, info: ValidationInfo) -> int:
        method, steps = info.data.get("method"), info.data.get("steps")
        window_size = info.data.get("window_size")
        if (
            method in ("tree_grpo", "mix_grpo")
            and info.data.get("window_schedule") == "fixed"
            and steps is not None
            and window_size is not None
            and window_start + window_size > steps
        ):
            raise _problem(
                window_start,
                f"must be at most {steps - window_size}: "
                f"rollout.steps ({steps}) - rollout.window_size ({window_size})",
            )
        return window_start

    @field_validator("split_steps")
    @classmethod
    def _splits_fit(cls, split_steps: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if split_steps is None:
            return None
        method, steps = info.data.get("method"), info.data.get("steps")
        if method is not None and method != "branch_grpo":
            raise _problem(split_steps, f"must be null with rollout.method {method}")
        if steps is not None and max(split_steps) >= steps:
            raise _problem(
                split_steps, f"must be steps from 0 to {steps - 1} (rollout.steps is {steps})"
            )
        if sorted(set(split_steps)) != split_steps:
            raise _problem(split_steps, "must be in increasing order, each step once")
        return split_steps

    @field_validator("max_leaves")
    @classmethod
    def _leaves_fit(cls, max_leaves: int, info: ValidationInfo) -> int:
        values = info.data
        # A field that was refused is absent; it has been reported already.
        needed = {"method", "trees", "branching", "group_size", "window_size", "split_steps"}
        if not needed <= values.keys():
            return max_leaves
        branching, trees = values["branching"], values["trees"]
        if values["method"] == "tree_grpo":
            exponent, formula = values["window_size"], "trees * branching^window_size"
            product = f"{trees} * {branching}^{exponent}"
        elif values["method"] == "branch_grpo":
            # Without split steps the method chooses them, and checks its leaves itself.
            exponent, formula = (
                len(values["split_steps"] or []),
                "branching^(number of split_steps)",
            )
            trees, product = 1, f"{branching}^{exponent}"
        else:
            if values["group_size"] > max_leaves:
                raise _problem(
                    max_leaves, f"must be at least rollout.group_size ({values['group_size']})"
                )
            return max_leaves
        # Far above any bound, the exact number is not worth the time that its digits take.
        leaves = trees * branching ** min(exponent, 64)
        if leaves > max_leaves:
            total = f" = {leaves}" if exponent <= 64 else ""
            raise _problem(
                max_leaves,
                f"a prompt would have {product}{total} samples ({formula}); "
                "use fewer, or raise max_leaves",
            )
        return max_leaves


class AdvantageConfig(_Section):
    """How rewards become advantages."""

    backup: Backup = "logprob"
    """How advantages of siblings combine into their parent's: by the softmax of their
    log-probabilities, by the mean, or relative to the siblings' mean at every node."""
    backup_temperature: Positive = 1.0
    """Temperature of the log-probability softmax."""
    std: AdvantageStd = "group"
    """What rewards are divided by: the prompt's own standard deviation, that of all prompts of the
    iteration, or nothing."""
    ddof: Literal[0, 1] = 0
    """0: population standard deviation; 1: the unbiased one."""
    eps: Positive = 1e-6
    """Added to a standard deviation before dividing by it."""
    advantage_clip: Positive | None = 5.0
    """Largest absolute advantage of a sample; null: unlimited."""


class ObjectiveConfig(_Section):
    """What an update maximizes."""

    clip_low: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """The ratio counts down to 1 - clip_low."""
    clip_high: Positive = 1e-4
    """The ratio counts up to 1 + clip_high."""
    log_prob_reduction: LogProbReduction = "mean"
    """Over a sample's dimensions: mean, as published clip ranges expect, or sum, the density."""
    kl_weight: AtLeastZero[float] = 0.0
    """Weight of the divergence from the initial model."""
    reference_on_cpu: bool = False
    """Keep the initial model on the CPU between updates (without LoRA, which needs no copy)."""
    guard: bool = False
    """Normalize the ratios of each step as GRPO-Guard does."""


class TrainConfig(_Section):
    """The optimization and the run."""

    iterations: AtLeastOne = 80
    """Iterations, each of one rollout and its updates."""
    learning_rate: Positive = 2e-4
    """Learning rate of AdamW after the warmup."""
    warmup_iterations: AtLeastZero[int] = 5
    """Iterations over which the learning rate grows linearly."""
    learning_rate_schedule: Literal["constant", "linear"] = "linear"
    """After the warmup: constant, or falling linearly to zero at the last iteration."""
    weight_decay: AtLeastZero[float] = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: BelowOne = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: BelowOne = 0.999
    """Decay of AdamW's second moment."""
    max_grad_norm: Positive = 1.0
    """Gradient norm above which the gradient is scaled down."""
    inner_epochs: AtLeastOne = 1
    """Passes over the samples of an iteration."""
    updates_per_iteration: AtLeastOne = 1
    """Optimizer steps per pass, each on an equal share of the iteration's prompts."""
    micro_batch: AtLeastOne = 128
    """Nodes per forward pass of an update; changes memory and time, not the gradient."""
    ema_decay: BelowOne | None = 0.9
    """Decay of the weights' moving average, which is then evaluated and exported; null: none."""
    seed: Seed = 0
    """Seed of prompts, windows, noises and adapters."""
    time_limit_minutes: Positive | None = None
    """Stop cleanly after the iteration that passes this time; null: no limit."""
    save_every: AtLeastZero[int] = 20
    """Iterations between checkpoints; 0: only at the end."""


class RewardConfig(_Section):
    """One reward and its share in the training signal."""

    name: Name
    """Built in, "module:function" or "module:Class" of your own, or a reward server's http://
    address."""
    weight: AtLeastZero[float] = 1.0
    """Weight in the combined advantage; 0: only watched."""
    label: Name | None = None
    """What it is called in metrics and tables; null: its name."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its own settings, such as path, device, dtype and batch_size of a reward model."""
    frames: AtLeastOne = 4
    """Evenly spaced frames of a video that are scored and averaged."""

    @property
    def key(self) -> str:
        """What it is called everywhere but in this configuration."""
        return self.label or self.name


class PromptsConfig(_Section):
    """Where prompts come from."""

    train: Name = "miniature"
    """Training prompts: "miniature" (embedded), a .txt file with one prompt per line, a .jsonl,
    .json, .csv, .tsv or .parquet file, or a Hugging Face dataset (owner/name:split)."""
    held_out: Name | None = None
    """Evaluation prompts, in the same way; null: a share of the training prompts (for "miniature":
    its own held-out list)."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share that is held out where held_out is null, chosen by a hash of each prompt."""
    column: Name = "prompt"
    """The column with the prompt; the other columns become metadata for rewards."""
    held_out_column: Name | None = None
    """That of held_out; null: the same."""


class EvaluationConfig(_Section):
    """Measuring the model on held-out prompts."""

    every: AtLeastZero[int] = 20
    """Iterations between evaluations; 0: only before and after training."""
    images_per_prompt: AtLeastOne = 4
    """Images per held-out prompt."""
    max_prompts: AtLeastOne | None = None
    """Use only the first so many held-out prompts; null: all."""
    seed: Seed = 0
    """Seed of the evaluation's noises: the same at every evaluation."""
    accuracy: Name | None = None
    """Which of the rewards is reported as accuracy, the share of images that are right; null:
    composition_accuracy, where it is one of them."""


def _default_rewards() -> list[RewardConfig]:
    return [
        RewardConfig(name="composition", weight=1.0),
        RewardConfig(name="composition_accuracy", weight=0.0),
    ]


class Config(_Section):
    """A whole training run; the defaults are the miniature job."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    rewards: list[RewardConfig] = Field(default_factory=_default_rewards)
    prompts: PromptsConfig = Field(default_factory=PromptsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    output: Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)] = Path(
        "runs/miniature"
    )
    """The folder that will hold everything about the run."""

    @field_validator("advantage")
    @classmethod
    def _siblings_exist(cls, advantage: AdvantageConfig, info: ValidationInfo) -> AdvantageConfig:
        rollout = info.data.get("rollout")
        if (
            rollout is not None
            and rollout.method in ("flow_grpo", "ddpo", "mix_grpo")
            and advantage.backup == "sibling"
        ):
            raise _problem(
                advantage.backup,
                f"must be logprob or uniform with rollout.method {rollout.method}, whose samples "
                "have no siblings to be compared with",
                field="backup",
            )
        return advantage

    @field_validator("train")
    @classmethod
    def _updates_share_prompts(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        rollout = info.data.get("rollout")
        if rollout is not None and rollout.prompts_per_iteration % train.updates_per_iteration:
            raise _problem(
                train.updates_per_iteration,
                f"must divide rollout.prompts_per_iteration ({rollout.prompts_per_iteration})",
                field="updates_per_iteration",
            )
        return train

    @field_validator("rewards")
    @classmethod
    def _rewards_train(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        names = [reward.key for reward in rewards]
        taken = [name for name in names if name in ("iteration", "seconds")]
        if taken:
            raise _problem(taken[0], "must be another label: a run's records use this name")
        if len(set(names)) < len(names):
            raise _problem(
                names, "must name each reward once; give a label where one is used twice"
            )
        if not any(reward.weight > 0 for reward in rewards):
            raise _problem(
                {reward.key: reward.weight for reward in rewards},
                "must have at least one reward with a weight above 0",
            )
        return rewards

    @field_validator("evaluation")
    @classmethod
    def _accuracy_is_scored(
        cls, evaluation: EvaluationConfig, info: ValidationInfo
    ) -> EvaluationConfig:
        names = [reward.key for reward in info.data.get("rewards", [])]
        if names and evaluation.accuracy not in (None, *names):
            raise _problem(
                evaluation.accuracy,
                f"must be one of the rewards ({', '.join(names)}); add it to them, with weight 0 "
                "if it is not to be trained on",
                field="accuracy",
            )
        return evaluation

    @property
    def accuracy(self) -> str | None:
        """The name of the reward that is reported as accuracy, if any."""
        names = [reward.key for reward in self.rewards]
        default = "composition_accuracy" if "composition_accuracy" in names else None
        return self.evaluation.accuracy or default


def load_config(path: Path | None, overrides: list[str]) -> Config:
    """The defaults, changed by a YAML file, changed by overrides.

    Args:
        path: the YAML file; None: the defaults alone. A list in it replaces the default list.
        overrides: `key.path=value` each, the value in YAML; a number addresses a list's element.

    Raises:
        ConfigError: lists every problem with its key, value and what is allowed.
    """
    data = Config().model_dump(mode="json")
    if path is not None:
        _merge(data, _read_mapping(path))
    for override in overrides:
        _apply_override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problems = [_describe(details) for details in error.errors()]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    lines = "".join(f"\n  {problem}" for problem in problems)
    raise ConfigError(f"the configuration has {len(problems)} problems:{lines}")


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


def describe_fields(
    section: type[BaseModel] = Config, prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(key, default as YAML, sentence with the choices) of every field, in order."""
    for name, field in section.model_fields.items():
        inner, is_list = _section_of(field)
        if inner is not None:
            yield from describe_fields(inner, f"{prefix}{name}.{'N.' if is_list else ''}")
        else:
            default = (
                "required"
                if field.is_required()
                else _shown(field.get_default(call_default_factory=True))
            )
            sentence = " ".join((field.description or "").split())
            if get_origin(field.annotation) is Literal:
                sentence += f" One of {', '.join(map(str, get_args(field.annotation)))}."
            yield f"{prefix}{name}", default, sentence


# --- reading YAML ---


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which 1e-4 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f'key "{key.value}" is given twice', problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


# YAML 1.1 asks for a point and a signed exponent, and reads "1e-4" as text.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, source: str) -> Any:
    """A YAML value, read as configurations are: 1e-4 is a number, a key given twice an error.

    Args:
        source: what the text is, to begin messages with.

    Raises:
        ConfigError: it is not valid; says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def _read_mapping(path: Path) -> dict[Any, Any]:
    text = read_utf8(path, "configuration file", ConfigError)
    data = parse_yaml(text, f"configuration file {path}")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"configuration file {path}: got {_shown(data)}; must be keys and values")
    return data


def _merge(base: dict[Any, Any], changes: dict[Any, Any]) -> None:
    for key, value in changes.items():
        if isinstance(base.get(key), dict) and (value is None or isinstance(value, dict)):
            # A section with nothing in it (all of it commented out) changes nothing.
            _merge(base[key], value or {})
        else:
            base[key] = copy.deepcopy(value)


def _apply_override(data: dict[Any, Any], override: str) -> None:
    key_path, equals, text = override.partition("=")
    keys = key_path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f'override "{override}": must be key.path=value')
    value = parse_yaml(text, f'override "{override}"')
    target: Any = data
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        last = depth == len(keys) - 1
        if isinstance(target, dict):
            if last:
                _merge(target, {key: value})
            else:
                target = target.setdefault(key, {})
        elif isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                allowed = f"must be 0 to {len(target) - 1}" if target else "the list is empty"
                raise ConfigError(f"{here}.{key}: no such element; {allowed}")
            if last:
                target[int(key)] = value
            else:
                target = target[int(key)]
        else:
            raise ConfigError(f"{here}: has no key {_shown(key)}; its value is {_shown(target)}")


# --- wording problems ---


def _problem(value: object, allowed: str, field: str = "") -> PydanticCustomError:
    """An error of our own; `field` names a field inside the validated one."""
    message = f"got {_shown(value)}; {allowed}"
    # Braces would be taken for placeholders in a template; as a context value they are not.
    return PydanticCustomError("inconsistent", "{message}", {"message": message, "field": field})


def _describe(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    location = [str(key) for key in details["loc"]]
    if kind == "inconsistent":
        if context["field"]:
            location.append(context["field"])
        return f"{'.'.join(location)}: {context['message']}"
    key_path = ".".join(location)
    if kind == "extra_forbidden":
        return f"{key_path}: unknown key; {_suggest(location)}"
    if kind == "missing":
        return f"{key_path}: missing; must be given"
    allowed = {
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "int_type": "must be an integer",
        "int_from_float": "must be an integer",
        "float_type": "must be a number",
        "finite_number": "must be finite",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "path_type": "must be a path",
        "list_type": "must be a list",
        "model_type": "must be keys and values",
        "literal_error": "must be one of {expected}",
        "too_short": "must have at least {min_length} element",
        "string_too_short": "must not be empty",
    }.get(kind, details["msg"].replace("{", "{{").replace("}", "}}"))
    words = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in context.items()
    }
    if kind == "literal_error":
        words["expected"] = str(context["expected"]).replace("'", '"').replace(" or ", ", ")
    return f"{key_path}: got {_shown(details['input'])}; {allowed.format(**words)}"


def _suggest(location: list[str]) -> str:
    *parents, key = location
    section: type[BaseModel] = Config
    for parent in parents:
        if not parent.isdecimal():
            inner, _ = _section_of(section.model_fields[parent])
            section = inner or section
    siblings = list(section.model_fields)
    near = difflib.get_close_matches(key, siblings, n=1)
    # A right name in the wrong section is as common a slip as a wrong name.
    elsewhere = [path for path, _, _ in describe_fields() if path.split(".")[-1] == key]
    if near or elsewhere:
        return f'did you mean "{(near or elsewhere)[0]}"?'
    return f"must be one of {', '.join(siblings)}"


def _section_of(field: FieldInfo) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if any, and whether it holds a list of them."""
    is_list = get_origin(field.annotation) is list
    annotation = get_args(field.annotation)[0] if is_list else field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, is_list
    return None, False


def _shown(value: object) -> str:
    """A value as it is written in YAML, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."
