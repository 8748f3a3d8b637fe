"""The configuration of a training run: one typed tree.

Every field carries a sentence, from which the command line's help is made. The sections `rollout`,
`advantage` and `objective` belong to the method (`methods/`). Nothing here looks at the disk or
imports torch, so that a wrong configuration is refused at once.

Left out: reading it (`reading.py`) and problems in words (`wording.py`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, create_model, field_validator

from treegrpo.errors import UserError
from treegrpo.methods.method import Method
from treegrpo.methods.registry import DEFAULT, find_method
from treegrpo.methods.settings import (
    AdvantageSettings,
    ClippedSettings,
    ObjectiveSettings,
    RolloutSettings,
)
from treegrpo.methods.trees import TreeAdvantageSettings, TreeSettings
from treegrpo.settings import (
    FREE_ON_RESUME,
    RECORDED_ON_RESUME,
    AtLeastOne,
    AtLeastZero,
    Batch,
    BelowOne,
    Name,
    Positive,
    Section,
    Seed,
    problem,
)

Tracker = Literal[
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
]


class ModelConfig(Section):
    """The policy that is trained."""

    path: Name = "miniature"
    """The model: "miniature" or "miniature-diffusion" (embedded), a diffusers folder, or a Hugging
    Face hub name."""
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
    embedding_cache: Annotated[Name | None, FREE_ON_RESUME] = "auto"
    """Folder of prompt embeddings, which are computed once, after which the text encoders leave
    memory; "auto": treegrpo in the user's cache folder; null: encoders and embeddings in memory."""
    embedding_cache_gib: Annotated[Positive | None, FREE_ON_RESUME] = 50.0
    """Most GiB of embeddings in that folder, of all models; those used longest ago are dropped
    first; null: no limit."""
    gradient_checkpointing: Annotated[bool, FREE_ON_RESUME] = False
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
    lora_path: Name | None = None
    """LoRA weights of lora_rank that training starts from, a file or a folder; null: fresh ones."""
    lora_targets: Annotated[list[Name], Field(min_length=1)] | None = None
    """Names of the layers that get an adapter; null: the attention layers of the model's family."""

    @field_validator("lora_path")
    @classmethod
    def _starts_adapters(cls, lora_path: str | None, info: ValidationInfo) -> str | None:
        if lora_path is not None and info.data.get("lora_rank") == 0:
            raise problem(
                lora_path,
                "must be null where lora_rank is 0, which trains all weights; set model.lora_rank "
                "to the rank of these weights",
            )
        return lora_path


class TrainConfig(Section):
    """The optimization and the run."""

    iterations: Annotated[AtLeastOne, RECORDED_ON_RESUME] = 80
    """Iterations, each of one rollout and its updates."""
    learning_rate: Annotated[Positive, RECORDED_ON_RESUME] = 2e-4
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
    max_grad_norm: Annotated[Positive, RECORDED_ON_RESUME] = 1.0
    """Gradient norm above which the gradient is scaled down."""
    inner_epochs: AtLeastOne = 1
    """Passes over the samples of an iteration."""
    updates_per_iteration: AtLeastOne = 1
    """Optimizer steps per pass, each on an equal share of the iteration's prompts."""
    micro_batch: Annotated[Batch, FREE_ON_RESUME] = "auto"
    """Nodes per forward pass of an update, which changes memory and time, not the gradient; auto:
    as many as fit into memory, at most 128; halved where memory runs out."""
    ema_decay: BelowOne | None = 0.9
    """Decay of the weights' moving average, which is then evaluated and exported; null: none."""
    seed: Seed = 0
    """Seed of prompts, windows, noises and adapters."""
    time_limit_minutes: Annotated[Positive | None, FREE_ON_RESUME] = None
    """Stop cleanly after the iteration that passes this time; null: no limit."""
    save_every: Annotated[AtLeastZero[int], FREE_ON_RESUME] = 20
    """Iterations between checkpoints; 0: only at the end."""


class RewardConfig(Section):
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


class PromptsConfig(Section):
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
    """The column with the prompt in held_out; null: the same as in train."""


class EvaluationConfig(Section):
    """Measuring the model on held-out prompts."""

    every: Annotated[AtLeastZero[int], FREE_ON_RESUME] = 20
    """Iterations between evaluations; 0: only before and after training."""
    images_per_prompt: AtLeastOne = 4
    """Images per held-out prompt."""
    steps: AtLeastOne | None = None
    """Denoising steps of evaluations, which the trained model is then exported with; null: those of
    rollouts."""
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


def _default_trackers() -> list[Tracker]:
    return ["tensorboard"]


class Config(Section):
    """A whole training run; the defaults are the miniature job, by TreeGRPO.

    Of another method it is a subclass, see `config_class`.
    """

    model: ModelConfig = Field(default_factory=ModelConfig)
    if TYPE_CHECKING:
        # What every method has. Each method's own keys are its own business.
        rollout: RolloutSettings = Field(default_factory=RolloutSettings)
        advantage: AdvantageSettings = Field(default_factory=AdvantageSettings)
        objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    else:
        rollout: TreeSettings = Field(default_factory=TreeSettings)
        advantage: TreeAdvantageSettings = Field(default_factory=TreeAdvantageSettings)
        objective: ClippedSettings = Field(default_factory=ClippedSettings)
    train: TrainConfig = Field(default_factory=TrainConfig)
    rewards: list[RewardConfig] = Field(default_factory=_default_rewards)
    prompts: PromptsConfig = Field(default_factory=PromptsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: Annotated[list[Tracker], FREE_ON_RESUME] = Field(default_factory=_default_trackers)
    """Where figures and pictures go beside the output folder, by Accelerate's trackers: any of
    tensorboard, wandb, trackio, mlflow, comet_ml, aim, clearml, dvclive, swanlab."""
    output: Annotated[
        Path, Field(strict=False), AfterValidator(Path.expanduser), FREE_ON_RESUME
    ] = Path("runs/miniature")
    """The folder that will hold everything about the run."""

    @field_validator("train")
    @classmethod
    def _updates_share_prompts(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        rollout = info.data.get("rollout")
        if rollout is not None and rollout.prompts_per_iteration % train.updates_per_iteration:
            raise problem(
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
            raise problem(taken[0], "must be another label: a run's records use this name")
        if len(set(names)) < len(names):
            raise problem(names, "must name each reward once; give a label where one is used twice")
        if not any(reward.weight > 0 for reward in rewards):
            raise problem(
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
            raise problem(
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

    def check_shares(self, processes: int) -> None:
        """Refuse prompts that processes and optimizer steps cannot share equally.

        Raises:
            UserError: says what their number must be a multiple of.
        """
        prompts, updates = self.rollout.prompts_per_iteration, self.train.updates_per_iteration
        if prompts % (processes * updates):
            raise UserError(
                f"rollout.prompts_per_iteration: got {prompts}; must be a multiple of {processes} "
                f"processes x {updates} updates per iteration"
            )

    @property
    def evaluation_steps(self) -> int:
        """Denoising steps of evaluations."""
        return self.evaluation.steps or self.rollout.steps

    @property
    def trained_rewards(self) -> list[RewardConfig]:
        """Those with a weight; the first is what "reward" means in metrics."""
        return [reward for reward in self.rewards if reward.weight > 0]


@cache
def config_class(method: str) -> type[Config]:
    """The configuration with a method's own sections.

    Raises:
        UserError: there is no such method.
    """
    if method == DEFAULT:
        return Config
    found = find_method(method)
    sections: dict[str, Any] = {
        "rollout": (found.rollout_settings, Field(default=found.rollout_settings(method=method))),
        "advantage": (found.advantage_settings, Field(default_factory=found.advantage_settings)),
        "objective": (found.objective_settings, Field(default_factory=found.objective_settings)),
    }
    return create_model(f"Config of {method}", __base__=Config, **sections)


def method_of(config: Config) -> Method:
    """The method that a configuration asks for, with its settings."""
    method = find_method(config.rollout.method)
    return method(config.rollout, config.advantage, config.objective, seed=config.train.seed)
