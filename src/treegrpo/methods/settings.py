"""The settings of methods: what all have, and what several share.

A method's own stand beside it, in a subclass. Together they are the configuration's sections
`rollout`, `advantage` and `objective`; a key that the chosen method does not have is refused.

Left out: the window's (`window.py`) and those of one method (beside it).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from treegrpo.settings import (
    FREE_ON_RESUME,
    RECORDED_ON_RESUME,
    AtLeastOne,
    AtLeastZero,
    Batch,
    Name,
    Positive,
    Section,
    problem,
)


class RolloutSettings(Section):
    """How the samples of a prompt are grown."""

    method: Name = "tree_grpo"
    """How samples are grown and learned from: tree_grpo, tree_endpoint, mix_grpo, flow_grpo,
    dance_grpo, branch_grpo, ddpo, or "module:Class" of your own."""
    steps: AtLeastOne = 10
    """Denoising steps of a sample."""
    transition: Literal["flow_sde", "dance_sde", "cps", "ddim"] | None = None
    """The stochastic step: flow_sde and dance_sde are for flow models alone, cps and ddim for
    diffusion models too; null: flow_sde for a flow model, ddim for a diffusion model."""
    noise_level: AtLeastZero[float] = 0.7
    """Strength of the stochastic step's noise."""
    prompts_per_iteration: AtLeastOne = 16
    """Prompts, each with a group of samples, per iteration."""
    max_leaves: AtLeastOne = 512
    """Most samples per prompt that a configuration may ask for: a guard against a slip."""
    max_batch: Annotated[Batch, FREE_ON_RESUME] = "auto"
    """Most samples in one forward pass of a rollout; auto: as many as fit into memory, at most 512;
    halved where memory runs out."""
    decode_batch: Annotated[Batch, FREE_ON_RESUME] = "auto"
    """Most samples decoded at once; auto: as many as fit into memory, at most max_batch; halved
    where memory runs out."""
    prompts_per_batch: Annotated[AtLeastOne | None, FREE_ON_RESUME] = None
    """Prompts sampled together; a batch's images are scored by servers while the next batch is
    sampled; null: all of a process's prompts."""
    offload: Annotated[bool, FREE_ON_RESUME] = False
    """Keep states and images in the CPU's memory, so that the device's does not grow with their
    number."""


class FinalStepSettings(RolloutSettings):
    """How methods that train every step grow samples."""

    deterministic_final_step: bool = False
    """Make the last step deterministic; cps and ddim need it where the schedule ends at sigma 0, so
    that their last step would add no noise."""


class GroupSettings(RolloutSettings):
    """How methods whose samples are trajectories of their own grow them."""

    group_size: AtLeastOne = 27
    """Samples per prompt."""

    @field_validator("group_size")
    @classmethod
    def _group_fits(cls, group_size: int, info: ValidationInfo) -> int:
        most = info.data.get("max_leaves")
        if most is not None and group_size > most:
            allowed = f"must be at least rollout.group_size ({group_size})"
            raise problem(most, allowed, beside="max_leaves")
        return group_size


class AdvantageSettings(Section):
    """How rewards become advantages."""

    std: Literal["group", "global", "none"] = "group"
    """What rewards are divided by: the prompt's own standard deviation, that of all prompts of the
    iteration, or nothing."""
    ddof: Literal[0, 1] = 0
    """0: population standard deviation; 1: the unbiased one."""
    eps: Positive = 1e-6
    """Added to a standard deviation before dividing by it."""
    advantage_clip: Positive | None = 5.0
    """Largest absolute advantage of a sample; null: unlimited."""


class ObjectiveSettings(Section):
    """What an update maximizes."""


class EdgeSettings(ObjectiveSettings):
    """What methods that learn from the forest's edges let one choose."""

    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """Over a sample's dimensions: mean, as published clip ranges expect, or sum, the density."""
    kl_weight: AtLeastZero[float] = 0.0
    """Weight of the divergence from the initial model."""
    reference_on_cpu: Annotated[bool, FREE_ON_RESUME] = False
    """Keep the initial model on the CPU between updates (without LoRA, which needs no copy)."""
    max_divergence: Annotated[Positive | None, RECORDED_ON_RESUME] = None
    """A trust region for several updates an iteration: where a node's Gaussian has moved this far,
    edges that the update already favours count no more (about 1e-4); null: unlimited."""


class ClippedSettings(EdgeSettings):
    """What methods that maximize the clipped objective let one choose."""

    clip_low: Annotated[float, Field(gt=0, le=1), RECORDED_ON_RESUME] = 1e-4
    """The ratio counts down to 1 - clip_low; with max_divergence there is no clip."""
    clip_high: Annotated[Positive, RECORDED_ON_RESUME] = 1e-4
    """The ratio counts up to 1 + clip_high."""
    guard: bool = False
    """Normalize the ratios of each step as GRPO-Guard does."""
