"""Every key of the configuration acts in a run: the table that says how, row by row.

A row changes one key of a tiny run and says what must differ from the run without the change, what
must not, and what must be so. A key without a row fails, so that none can be added unproved.
`python tests/cut_keys.py` cuts every key loose and shows which row notices.

Left out: how a run is observed (wiring.py); what a part does with its settings (its own tests);
which values are refused (test_config.py).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pytest import approx
from wiring import Observer, distance, make_files

from treegrpo.config import describe_fields
from treegrpo.errors import UserError
from treegrpo.plan import PlanError

# Relative differences: at least so much is one, and at most so much is rounding.
DIFFERENT = 1e-3
ROUNDING = 1e-4
# AdamW divides by a gradient's size, which makes much of rounding where there is little else: in
# how weights move, and in what the moved ones draw.
ROUNDING_OF_MOVED = 1e-2
MOVED = ("movement", "evaluations")

# --- contexts ---

COMMON = (
    "model.path=$files/images",
    "model.device=cpu",
    "model.guidance_scale=1.0",
    "rollout.steps=3",
    "rollout.prompts_per_iteration=2",
    "rollout.max_batch=64",
    "train.iterations=2",
    "train.learning_rate=1e-2",
    "train.learning_rate_schedule=constant",
    "train.warmup_iterations=0",
    "train.max_grad_norm=1e6",
    "train.ema_decay=null",
    "train.save_every=0",
    "train.micro_batch=64",
    "rewards=[{name: 'wiring:brightness'}]",
    "prompts.train=$files/train.jsonl",
    "prompts.held_out=$files/held_out.jsonl",
    "evaluation.every=0",
    "evaluation.max_prompts=2",
    "evaluation.images_per_prompt=1",
    "output=run",
)
_WINDOW = ("rollout.window_size=2", "rollout.window_schedule=fixed")
TREE = (*COMMON, "rollout.method=tree_grpo", "rollout.branching=2", *_WINDOW)
ENDPOINT = (*COMMON, "rollout.method=tree_endpoint", "rollout.branching=2", *_WINDOW)
MIX = (*COMMON, "rollout.method=mix_grpo", "rollout.group_size=3", *_WINDOW)
FLOW = (*COMMON, "rollout.method=flow_grpo", "rollout.group_size=3")
DDPO = (*COMMON, "rollout.method=ddpo", "rollout.group_size=3")
DANCE = (*COMMON, "rollout.method=dance_grpo", "rollout.group_size=3")
BRANCH = (
    *COMMON,
    "rollout.method=branch_grpo",
    "rollout.branching=2",
    "rollout.split_steps=[0, 1]",
)
METHODS = {
    "tree": TREE,
    "endpoint": ENDPOINT,
    "mix": MIX,
    "flow": FLOW,
    "ddpo": DDPO,
    "dance": DANCE,
    "branch": BRANCH,
}
WINDOWED = {"tree": TREE, "endpoint": ENDPOINT, "mix": MIX}
# Windows that have somewhere to go.
MOVING = {
    name: (*context, "rollout.steps=5", "rollout.window_size=1")
    for name, context in WINDOWED.items()
}
SHIFTING = {
    name: (*context, "rollout.window_schedule=shifting", "rollout.shift_every=1")
    for name, context in MOVING.items()
}
TAILED = {
    name: (*context, "rollout.steps=5", "rollout.tail_check_every=0")
    for name, context in WINDOWED.items()
}
RANDOM = {
    name: (*context, "rollout.window_schedule=random", "rollout.window_decay=1.0")
    for name, context in MOVING.items()
}
GUIDED = (*TREE, "model.guidance_scale=3.0")
LORA = (*TREE, "model.lora_rank=2")
KL = (*TREE, "objective.kl_weight=0.5")
VIDEO = (*TREE, "model.path=$files/videos", "train.iterations=1")
# The second pass is on a policy that the samples do not come from, so that its ratios are not 1.
TWO_PASSES = (
    *TREE,
    "train.learning_rate=1e-4",
    "train.inner_epochs=2",
    "objective.clip_low=1",
    "objective.clip_high=1e3",
)
TWO_REWARDS = (*TREE, "rewards=[{name: 'wiring:brightness'}, {name: 'wiring:redness'}]")
# Embeddings of the prompts that will be drawn, the held-out ones and the negative one.
STORED = (*TREE, "model.embedding_cache=embeddings")
LINEAR = (*STORED, "train.learning_rate_schedule=linear")

# --- what a run shows, by subject; wiring.py tells what each name is ---

IMAGES = ("first_leaves", "first_rewards", "first_evaluations")
FIRST = ("first_log_probs", *IMAGES)
LEARNED = ("gradients", "movement", "exported")
# All that a run is for.
RESULTS = (
    *("prompts", "noise", "plans", "sigmas", "transitions", "leaves", "log_probs", "rewards"),
    *("advantages", "gradients", "movement", "evaluations", "learning_rates", "metrics_names"),
)


@dataclass(frozen=True)
class Row:
    """One key, changed.

    Attributes:
        key: as the configuration's reference writes it.
        value: in YAML.
        context: the settings in which the key acts.
        changes: what must differ from the run without the change.
        keeps: what must not.
        becomes: what must be so with the change, and not without it.
        refused: a pattern of the error that the change leads to, where the run without it works.
        case: tells rows of one key apart.
        rounds: `keeps` is up to rounding: the work is done in another order.
        reward: the number that stands for N.
    """

    key: str
    value: str
    context: tuple[str, ...] = TREE
    changes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    becomes: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    case: str = ""
    rounds: bool = False
    reward: int = 0

    @property
    def override(self) -> str:
        return f"{self.key.replace('.N.', f'.{self.reward}.')}={self.value}"

    @property
    def name(self) -> str:
        return f"{self.key} {self.case}".strip()


def time_and_memory_only(
    key: str, value: str, context: tuple[str, ...] = TREE, case: str = "", **acts: Any
) -> Row:
    """A key that changes nothing but how the work is done; `becomes` and `changes` say how."""
    return Row(key, value, context, keeps=RESULTS, case=case, rounds=True, **acts)


def for_each(
    contexts: Mapping[str, tuple[str, ...]], key: str, value: str, **what: Any
) -> list[Row]:
    """A row per method, each of which has this key of its own."""
    return [Row(key, value, context, case=name, **what) for name, context in contexts.items()]


MODEL = [
    Row("model.path", "$files/others", changes=("untrained", *IMAGES, *LEARNED)),
    Row("model.path", "$files/others", LORA, case="of LoRA weights", changes=("sampling",)),
    Row(
        "model.dtype",
        "bfloat16",
        becomes={"dtype": ["torch.bfloat16"]},
        changes=IMAGES,
        keeps=("noise", "untrained", "weight_dtypes"),
    ),
    Row("model.device", "meta", refused=r"^model\.device: got 'meta'"),
    Row(
        "model.guidance_scale",
        "3.0",
        case="on",
        changes=("rollout_batches", "update_batches", "evaluation_batches"),
        keeps=("noise", "plans"),
    ),
    Row(
        "model.guidance_scale",
        "6.0",
        GUIDED,
        case="more",
        changes=("sampling", *IMAGES, *LEARNED),
        keeps=("noise", "rollout_batches"),
    ),
    Row(
        "model.negative_prompt",
        "no 7",
        GUIDED,
        changes=("sampling", *IMAGES, *LEARNED),
        keeps=("noise",),
    ),
    Row(
        "model.height", "24", becomes={"image_sizes": [(3, 24, 16)]}, changes=("sampling", *IMAGES)
    ),
    Row("model.width", "24", becomes={"image_sizes": [(3, 16, 24)]}, changes=("sampling", *IMAGES)),
    Row(
        "model.frames",
        "1",
        VIDEO,
        becomes={"images_scored": [2 * 4], "evaluation_images": [2, 2]},
        changes=("noise", "sampling"),
    ),
    Row("model.frames", "5", case="image", refused=r"^model\.frames: got 5; .* makes images"),
    Row(
        "model.max_sequence_length",
        "8",
        changes=("conditioning", "sampling", "first_leaves", "first_evaluations", "gradients"),
        keeps=("noise",),
    ),
    time_and_memory_only("model.embedding_cache", "embeddings", changes=("files", "embeddings")),
    Row(
        "model.embedding_cache_gib",
        "1e-9",
        STORED,
        refused=r"^model\.embedding_cache_gib: got 1e-09, but the embeddings of 7 prompts take",
    ),
    time_and_memory_only("model.gradient_checkpointing", "true", becomes={"checkpointing": [True]}),
    time_and_memory_only("model.compile", "true", becomes={"compiled": ["SD3Transformer2DModel"]}),
    time_and_memory_only(
        "model.attention_backend",
        "native",
        VIDEO,
        becomes={"attention_backends": [("native",)]},
    ),
    Row(
        "model.attention_backend",
        "native",
        case="no choice",
        refused=r"^model\.attention_backend: got 'native'; the transformer of .* has no choice",
    ),
    Row(
        "model.attention_backend",
        "quick",
        case="unknown",
        refused=r"^model\.attention_backend: got 'quick'; must be one of",
    ),
    time_and_memory_only("model.vae_tiling", "true", becomes={"tiling": [True]}),
    Row(
        "model.lora_rank",
        "2",
        case="on",
        changes=("trained", "files", *LEARNED),
        keeps=("noise", *FIRST),
    ),
    Row("model.lora_rank", "3", LORA, case="more", changes=("trained", *LEARNED), keeps=FIRST),
    Row(
        "model.lora_rank",
        "2",
        (*TREE, "model.dtype=bfloat16"),
        case="bfloat16",
        becomes={"weight_dtypes": [("torch.bfloat16", "torch.float32")]},
    ),
    Row("model.lora_alpha", "4.0", LORA, case="by default", keeps=RESULTS),
    Row(
        "model.lora_alpha",
        "16.0",
        LORA,
        changes=("first_gradients", "evaluations", "exported"),
        keeps=("trained", "untrained", *FIRST),
    ),
    Row(
        "model.lora_path",
        "$files/lora",
        LORA,
        changes=("untrained", *IMAGES, *LEARNED),
        keeps=("trained", "noise"),
    ),
    Row(
        "model.lora_targets",
        "[attn.to_q]",
        LORA,
        changes=("trained", *LEARNED),
        keeps=("noise", *FIRST),
    ),
]

T, F = True, False
# The checkpoint's, for four steps.
SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
SCHEDULER.set_timesteps(4)
TIMESTEPS = SCHEDULER.timesteps.tolist()


def plans(roots: int, branching: tuple[int, ...], stochastic: tuple[bool, ...]) -> dict[str, Any]:
    """The same plan in both iterations."""
    return {"plans": [(roots, branching, stochastic)] * 2}


GROUPS = (*COMMON, "rollout.group_size=3")
BRANCHES = (*COMMON, "rollout.branching=2")
FLOW_PLAN, DANCE_PLAN = plans(3, (1, 1, 1), (T, T, T)), plans(1, (3, 1, 1), (T, T, T))
ROLLOUT = [
    Row(
        "rollout.method",
        "dance_grpo",
        (*GROUPS, "rollout.method=flow_grpo"),
        case="dance",
        becomes=DANCE_PLAN,
    ),
    Row(
        "rollout.method",
        "mix_grpo",
        (*GROUPS, "rollout.method=flow_grpo", "rollout.steps=4"),
        case="mix",
        becomes=plans(3, (1, 1, 1, 1), (T, T, T, F)),
    ),
    *(
        Row(
            "rollout.method",
            method,
            (*GROUPS, "rollout.method=dance_grpo"),
            case=method,
            becomes=FLOW_PLAN,
        )
        for method in ("flow_grpo", "ddpo")
    ),
    Row(
        "rollout.method",
        "branch_grpo",
        (*BRANCHES, "rollout.method=tree_grpo"),
        case="branch",
        becomes=plans(1, (2, 2, 1), (T, T, T)),
    ),
    Row(
        "rollout.method",
        "tree_grpo",
        (*BRANCHES, "rollout.method=branch_grpo"),
        case="tree",
        becomes=plans(1, (2, 2, 2), (T, T, T)),
    ),
    Row(
        "rollout.steps",
        "4",
        KL,
        becomes={
            **plans(1, (2, 2, 1, 1), (T, T, F, F)),
            "sigmas": approx(SCHEDULER.sigmas.tolist()),
            "rollout_timesteps": approx(TIMESTEPS),
            "evaluation_timesteps": approx(TIMESTEPS),
            "update_timesteps": approx(TIMESTEPS[:2]),
            "reference_timesteps": approx(TIMESTEPS[:2]),
        },
        changes=("first_leaves", "first_evaluations", "sampling"),
        keeps=("prompts", "noise"),
    ),
    *for_each(SHIFTING, "rollout.steps", "2", becomes={"window": [0, 0]}),
    *for_each(
        {"tree": TREE, "endpoint": ENDPOINT},
        "rollout.trees",
        "2",
        becomes=plans(2, (2, 2, 1), (T, T, F)),
        changes=("noise",),
    ),
    Row(
        "rollout.method",
        "tree_endpoint",
        case="endpoint",
        changes=("first_gradients", "metrics_names"),
        keeps=("plans", "noise", *FIRST),
    ),
    *for_each(
        {"tree": TREE, "endpoint": ENDPOINT},
        "rollout.branching",
        "3",
        becomes=plans(1, (3, 3, 1), (T, T, F)),
        keeps=("noise",),
    ),
    *for_each(
        {"branch": BRANCH},
        "rollout.branching",
        "3",
        becomes=plans(1, (3, 3, 1), (T, T, T)),
        keeps=("noise",),
    ),
    *for_each({"mix": MIX}, "rollout.group_size", "2", becomes=plans(2, (1, 1, 1), (T, T, F))),
    *for_each(
        {"flow": FLOW, "ddpo": DDPO},
        "rollout.group_size",
        "2",
        becomes=plans(2, (1, 1, 1), (T, T, T)),
    ),
    *for_each({"dance": DANCE}, "rollout.group_size", "2", becomes=plans(1, (2, 1, 1), (T, T, T))),
    *for_each(
        {"tree": TREE, "endpoint": ENDPOINT},
        "rollout.window_size",
        "1",
        becomes=plans(1, (2, 1, 1), (T, F, F)),
    ),
    *for_each({"mix": MIX}, "rollout.window_size", "1", becomes=plans(3, (1, 1, 1), (T, F, F))),
    *for_each(
        {f"{name} shifting": context for name, context in SHIFTING.items()},
        "rollout.window_size",
        "4",
        becomes={"window": [0, 0]},
    ),
    *for_each(MOVING, "rollout.window_schedule", "random", changes=("window",)),
    *for_each(MOVING, "rollout.window_start", "1", becomes={"window": [1, 1]}),
    *for_each(RANDOM, "rollout.window_decay", "1e-3", becomes={"window": [0, 0]}),
    *for_each(SHIFTING, "rollout.shift_by", "2", becomes={"window": [0, 2]}),
    *for_each(SHIFTING, "rollout.shift_every", "2", becomes={"window": [0, 0]}),
    *for_each(
        TAILED,
        "rollout.tail_steps",
        "1",
        becomes={"levels": [(0, 1, 2, 5)] * 2},
        changes=("rollout_batches", "first_leaves", "gradients"),
        keeps=("noise", "sigmas", "first_log_probs", "first_evaluations"),
    ),
    *for_each(
        {name: (*context, "rollout.tail_steps=1") for name, context in TAILED.items()},
        "rollout.tail_check_every",
        "2",
        becomes={"tail_checks": [0]},
        keeps=("noise", "leaves", "gradients", "evaluations"),
    ),
    Row("rollout.split_steps", "[0, 2]", BRANCH, becomes=plans(1, (2, 1, 2), (T, T, T))),
    Row(
        "rollout.split_steps",
        "null",
        (*BRANCH, "rollout.split_steps=[0]"),
        case="chosen",
        becomes=plans(1, (2, 2, 1), (T, T, T)),
    ),
    *for_each(
        {"flow": FLOW, "ddpo": DDPO},
        "rollout.deterministic_final_step",
        "true",
        becomes=plans(3, (1, 1, 1), (T, T, F)),
    ),
    *for_each(
        {"dance": DANCE},
        "rollout.deterministic_final_step",
        "true",
        becomes=plans(1, (3, 1, 1), (T, T, F)),
    ),
    *for_each(
        {"branch": BRANCH},
        "rollout.deterministic_final_step",
        "true",
        becomes=plans(1, (2, 2, 1), (T, T, F)),
    ),
    *for_each(
        METHODS,
        "rollout.transition",
        "dance_sde",
        changes=("transitions", "first_leaves", "first_log_probs", "gradients"),
        keeps=("noise", "plans", "sigmas", "first_evaluations"),
    ),
    *for_each(
        METHODS,
        "rollout.noise_level",
        "0.3",
        changes=("transitions", "first_leaves", "first_log_probs", "gradients"),
        keeps=("noise", "plans", "sigmas", "first_evaluations"),
    ),
    Row(
        "rollout.max_leaves",
        "1",
        (*BRANCHES, "rollout.method=branch_grpo"),
        case="chosen steps",
        refused=r"= 4 leaves per prompt .*, more than max_leaves = 1$",
    ),
    *for_each(METHODS, "rollout.max_leaves", "1", refused=r"max_leaves"),
    time_and_memory_only(
        "rollout.max_batch",
        "3",
        (*TREE, "evaluation.images_per_prompt=2"),
        becomes={
            "rollout_largest": 3,
            "rollout_decode_largest": 3,
            "evaluation_largest": 2,
            "evaluation_decode_largest": 2,
        },
    ),
    time_and_memory_only(
        "rollout.decode_batch",
        "1",
        becomes={"rollout_decode_largest": 1, "evaluation_decode_largest": 1},
    ),
    time_and_memory_only("rollout.prompts_per_batch", "1", becomes={"rollouts": 4}),
    time_and_memory_only("rollout.offload", "true", becomes={"offloaded": ["images", "noise"]}),
    Row(
        "rollout.prompts_per_iteration",
        "3",
        STORED,
        becomes={"images_scored": [12, 12], "drawn": 6, "embeddings": 6 + 2 + 1},
        changes=("prompts", "noise", "gradients"),
        keeps=("first_evaluations",),
    ),
]

NORMALIZED = {"tree": TREE, "flow": FLOW}
BACKED_UP: dict[str, Any] = {
    "changes": ("advantages", "first_gradients"),
    "keeps": ("noise", *FIRST),
}
ADVANTAGE = [
    Row("advantage.backup", "uniform", case="uniform", **BACKED_UP),
    Row("advantage.backup", "sibling", case="sibling", **BACKED_UP),
    Row("advantage.backup_temperature", "0.01", **BACKED_UP),
    *(
        row
        for key, value in (("std", "global"), ("std", "none"), ("ddof", "1"), ("eps", "0.01"))
        for row in for_each(
            {f"{name} {value}": context for name, context in NORMALIZED.items()},
            f"advantage.{key}",
            value,
            **BACKED_UP,
        )
    ),
    Row("advantage.ddof", "1", (*TREE, "advantage.std=global"), case="global", **BACKED_UP),
    Row("advantage.eps", "0.01", (*TREE, "advantage.std=global"), case="global", **BACKED_UP),
    *for_each({**NORMALIZED, "branch": BRANCH}, "advantage.advantage_clip", "0.5", **BACKED_UP),
    # Of its own estimator, which normalises within each depth.
    *for_each(
        {"branch": BRANCH}, "advantage.eps", "1.0", changes=("advantages", "first_gradients")
    ),
    *for_each({"branch": BRANCH}, "advantage.ddof", "0", changes=("advantages", "first_gradients")),
]

OBJECTIVE = [
    *(
        Row(
            f"objective.{key}",
            "1e-3",
            TWO_PASSES,
            becomes={"clip_ranges": [clip_range]},
            changes=("gradients", "clip_fractions", "movement"),
            keeps=("first_gradients", *FIRST),
        )
        for key, clip_range in (("clip_low", (1e-3, 1e3)), ("clip_high", (1.0, 1e-3)))
    ),
    Row(
        "objective.log_prob_reduction",
        "sum",
        changes=("first_log_probs", "advantages", "gradients"),
        keeps=("noise", "first_leaves", "first_evaluations"),
    ),
    Row(
        "objective.kl_weight",
        "0.5",
        case="on",
        becomes={"networks": 2},
        changes=("reference_batches", "kl", "gradients", "movement"),
        keeps=FIRST,
    ),
    Row(
        "objective.kl_weight",
        "0.5",
        LORA,
        case="LoRA",
        changes=("reference_batches", "kl", "gradients", "movement"),
        keeps=("networks", *FIRST),
    ),
    Row(
        "objective.kl_weight",
        "5.0",
        KL,
        case="more",
        changes=("gradients", "movement"),
        keeps=("reference_batches", *FIRST),
    ),
    time_and_memory_only(
        "objective.reference_on_cpu",
        "true",
        KL,
        becomes={"modules_on_cpu": ["SD3Transformer2DModel"] * 3},  # at first, and when it was used
    ),
    *(
        Row(
            "objective.max_divergence",
            "1e-12",
            (*context, "train.inner_epochs=2", *clip),
            case=name,
            changes=("clip_fractions", "gradients"),
            keeps=("noise", "first_gradients", *FIRST),
        )
        for name, context, clip in (
            ("clipped", TREE, ("objective.clip_low=1", "objective.clip_high=1e3")),
            ("endpoint", ENDPOINT, ()),
        )
    ),
    Row(
        "objective.guard",
        "true",
        changes=("first_gradients", "gradients", "losses"),
        keeps=("noise", *FIRST),
    ),
]

TRAIN = [
    Row(
        "train.iterations",
        "3",
        LINEAR,
        becomes={
            "iterations": 3,
            "learning_rates": approx([1e-2, 2e-2 / 3, 1e-2 / 3]),
            "progress": [(str(number), "3") for number in (1, 2, 3)],
            "embeddings": 6 + 2 + 1,
        },
        keeps=(*FIRST, "first_gradients"),
    ),
    Row(
        "train.learning_rate",
        "2e-2",
        becomes={"learning_rates": approx([2e-2, 2e-2])},
        changes=("movement", "exported"),
        keeps=(*FIRST, "first_gradients"),
    ),
    Row(
        "train.warmup_iterations",
        "1",
        becomes={"learning_rates": approx([0.5e-2, 1e-2])},
        changes=("movement",),
        keeps=(*FIRST, "first_gradients"),
    ),
    Row(
        "train.learning_rate_schedule",
        "linear",
        becomes={"learning_rates": approx([1e-2, 0.5e-2])},
        changes=("movement",),
        keeps=("gradients",),
    ),
    Row(
        "train.weight_decay",
        "0.5",
        changes=("movement",),
        keeps=(*FIRST, "first_gradients"),
    ),
    Row(
        "train.adam_beta1",
        "0.5",
        changes=("first_moment", "movement"),
        keeps=(*FIRST, "first_gradients"),
    ),
    Row(
        "train.adam_beta2",
        "0.5",
        changes=("second_moment", "movement"),
        keeps=(*FIRST, "first_gradients"),
    ),
    Row(
        "train.max_grad_norm",
        "1e-3",
        changes=("first_gradients", "first_moment"),
        keeps=(*FIRST, "first_gradient_norms"),
    ),
    Row(
        "train.inner_epochs",
        "2",
        becomes={"steps": 4},
        changes=("ratios", "movement"),
        keeps=(*FIRST, "rollout_batches", "first_gradients"),
    ),
    Row(
        "train.updates_per_iteration",
        "2",
        becomes={"steps": 4},
        changes=("update_batches", "first_gradients", "movement"),
        keeps=(*FIRST, "rollout_batches"),
    ),
    time_and_memory_only(
        "train.micro_batch", "3", KL, becomes={"update_largest": 3, "reference_largest": 3}
    ),
    Row(
        "train.ema_decay",
        "0.9",
        case="on",
        changes=("average", "exported", "evaluations"),
        keeps=(*FIRST, "gradients", "movement"),
    ),
    Row(
        "train.ema_decay",
        "0.01",
        (*TREE, "train.ema_decay=0.9"),
        case="faster",
        changes=("average", "exported", "evaluations"),
        keeps=(*FIRST, "gradients", "movement"),
    ),
    Row(
        "train.seed",
        "7",
        changes=("prompts", "noise", "gradients"),
        keeps=("untrained", "evaluation_noise", "first_evaluations"),
    ),
    *for_each(RANDOM, "train.seed", "5", changes=("window",)),
    Row("train.seed", "7", LORA, case="LoRA", changes=("untrained",)),
    Row(
        "train.time_limit_minutes",
        "1e-9",
        becomes={"iterations": 1, "evaluated_at": [0, 1]},
        changes=("messages",),
        keeps=("first_gradients",),
    ),
    Row(
        "train.save_every",
        "1",
        becomes={"saved_at": [1, 2]},
        keeps=LEARNED,
    ),
]

REWARDS = [
    Row(
        "rewards.N.name",
        "wiring:redness",
        becomes={"rewards_asked": ["redness"]},
        changes=("first_rewards", "advantages", "metrics_names", "evaluations", *LEARNED),
        keeps=("first_leaves",),
    ),
    Row(
        "rewards.N.weight",
        "3.0",
        TWO_REWARDS,
        case="more",
        reward=1,
        changes=("advantages", *LEARNED),
        keeps=FIRST,
    ),
    Row(
        "rewards.N.weight",
        "0.0",
        TWO_REWARDS,
        case="watched",
        reward=1,
        changes=("advantages", *LEARNED),
        keeps=(*FIRST, "rewards_asked", "metrics_names"),
    ),
    Row(
        "rewards.N.weight",
        "0.0",
        TWO_REWARDS,
        case="first",
        changes=("first_rewards", "advantages", *LEARNED),
        keeps=("rewards_asked", "metrics_names", "first_evaluations"),
    ),
    Row(
        "rewards.N.label",
        "shine",
        changes=("metrics_names", "evaluations"),
        keeps=("rewards", *LEARNED),
    ),
    Row(
        "rewards.N.options",
        "{power: 3.0}",
        (*TREE, "rewards=[{name: 'wiring:Power'}]"),
        changes=("first_rewards", "first_evaluations", "advantages"),
        keeps=("first_leaves",),
    ),
    Row(
        "rewards.N.frames",
        "2",
        VIDEO,
        becomes={"images_scored": [2 * 4 * 2], "evaluation_images": [2 * 2] * 2},
        changes=("first_rewards", "first_evaluations"),
        keeps=("first_leaves",),
    ),
]

SPLIT = (*TREE, "prompts.held_out=null", "prompts.held_out_share=0.2", "evaluation.max_prompts=9")
PROMPTS = [
    Row(
        "prompts.train",
        "$files/others.jsonl",
        changes=("prompts", "metadata", "first_leaves"),
        keeps=("noise", "evaluation_prompts", "first_evaluations"),
    ),
    Row(
        "prompts.held_out",
        "$files/others.jsonl",
        changes=("evaluation_prompts", "first_evaluations"),
        keeps=("prompts", "evaluation_noise", *LEARNED),
    ),
    Row("prompts.held_out_share", "0.6", SPLIT, changes=("evaluation_prompts", "prompts")),
    Row(
        "prompts.column",
        "caption",
        changes=("prompts", "metadata", "evaluation_prompts", "first_leaves"),
    ),
    Row(
        "prompts.held_out_column",
        "caption",
        changes=("evaluation_prompts", "first_evaluations"),
        keeps=("prompts", "metadata", *LEARNED),
    ),
]

EVALUATION = [
    Row("evaluation.every", "1", becomes={"evaluated_at": [0, 1, 2]}, keeps=LEARNED),
    Row("evaluation.images_per_prompt", "2", becomes={"evaluation_images": [4, 4]}, keeps=LEARNED),
    Row(
        "evaluation.steps",
        "4",
        becomes={"evaluation_timesteps": approx(TIMESTEPS)},
        changes=("evaluations", "sampling"),
        keeps=("noise", "plans", "sigmas", "rollout_timesteps", *LEARNED),
    ),
    Row("evaluation.max_prompts", "1", becomes={"evaluation_images": [1, 1]}, keeps=LEARNED),
    Row(
        "evaluation.seed",
        "7",
        changes=("evaluation_noise", "evaluations"),
        keeps=("noise", "evaluation_prompts", *LEARNED),
    ),
    Row(
        "evaluation.accuracy",
        "wiring:brightness",
        changes=("metrics_names", "accuracy"),
        keeps=("evaluations", *LEARNED),
    ),
]

OUTPUT = [
    Row("output", "elsewhere", changes=("files",), keeps=(*LEARNED, "evaluations")),
    Row("tracking", "[]", changes=("files",), keeps=(*LEARNED, "evaluations")),
]

ROWS = [
    *(*MODEL, *ROLLOUT, *ADVANTAGE, *OBJECTIVE, *TRAIN, *REWARDS, *PROMPTS, *EVALUATION, *OUTPUT)
]


def check(row: Row, observe: Observer) -> None:
    """Whether a run with the row's change differs from one without as the row says."""
    changed = (*row.context, row.override)
    without = observe(row.context)
    if row.refused:
        with pytest.raises((UserError, PlanError)) as caught:
            observe(changed)
        assert re.search(row.refused, str(caught.value)), f"{row.name}: refused with {caught.value}"
        return
    seen = observe(changed)
    for name, value in row.becomes.items():
        assert seen[name] == value, f"{row.override}: {name} is {seen[name]}, not {value}"
        assert without[name] != value, f"{row.override}: {name} is {value} without it too"
    for name in row.changes:
        moved = distance(without[name], seen[name])
        assert moved > DIFFERENT, (
            f"{row.override} must change {name}; the difference is {moved:.0e}"
        )
    for name in row.keeps:
        moved = distance(without[name], seen[name])
        allowed = 0.0
        if row.rounds:
            allowed = ROUNDING_OF_MOVED if name in MOVED else ROUNDING
        assert moved <= allowed, f"{row.override} must not change {name}; it did by {moved:.0e}"


@contextmanager
def quick_collections() -> Iterator[None]:
    """A run collects garbage; what was there before it need not be looked at each time."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def observe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observer]:
    folder = tmp_path_factory.mktemp("wiring")
    make_files(folder)
    with quick_collections():
        yield Observer(folder, folder / "runs")


def test_every_key_has_a_row_and_every_row_a_key() -> None:
    assert {row.key for row in ROWS} == {key for key, _, _ in describe_fields()}
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(row.changes or row.becomes or row.keeps or row.refused for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_key_acts(row: Row, observe: Observer) -> None:
    check(row, observe)


def test_branch_grpo_has_an_estimator_of_its_own(observe: Observer) -> None:
    tree = observe((*TREE, "rollout.window_size=3"))
    branch = observe((*BRANCH, "rollout.split_steps=[0, 1, 2]"))
    for name in ("plans", "noise", *FIRST):
        assert distance(tree[name], branch[name]) == 0.0
    for name in ("advantages", "first_gradients"):
        assert distance(tree[name], branch[name]) > DIFFERENT
