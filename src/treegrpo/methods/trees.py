"""Methods whose samples branch: TreeGRPO and BranchGRPO.

Left out: the arithmetic of plans and backups (`plan.py`, `advantage.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from treegrpo import plan
from treegrpo.methods.method import Credit, Scores
from treegrpo.methods.policy_gradient import PolicyGradient
from treegrpo.methods.settings import AdvantageSettings, FinalStepSettings
from treegrpo.methods.window import WindowMethod, WindowSettings
from treegrpo.plan import RolloutPlan
from treegrpo.settings import AtLeastOne, AtLeastZero, Positive, problem

if TYPE_CHECKING:
    from treegrpo.rollout import Rollout


class TreeSettings(WindowSettings):
    """How TreeGRPO grows samples."""

    trees: AtLeastOne = 1
    """Independent initial noises per prompt."""
    branching: AtLeastOne = 3
    """Children of a node at each branching step."""

    @field_validator("branching")
    @classmethod
    def _leaves_fit(cls, branching: int, info: ValidationInfo) -> int:
        trees, size = info.data.get("trees"), info.data.get("window_size")
        if trees is not None and size is not None:
            formula = "trees * branching^window_size"
            _check_leaves(info.data.get("max_leaves"), trees, branching, size, formula)
        return branching


class TreeAdvantageSettings(AdvantageSettings):
    """How TreeGRPO's rewards become advantages."""

    backup: Literal["logprob", "uniform", "sibling"] = "logprob"
    """How advantages of siblings combine into their parent's: by the softmax of their
    log-probabilities, by the mean, or relative to the siblings' mean at every node."""
    backup_temperature: Positive = 1.0
    """Temperature of the log-probability softmax."""


class TreeMethod(WindowMethod):
    """Every node inside the window branches; leaf advantages are backed up the tree."""

    rollout_settings = TreeSettings
    advantage_settings = TreeAdvantageSettings
    rollout: TreeSettings
    advantage: TreeAdvantageSettings

    def plan_at(self, window_start: int) -> RolloutPlan:
        """`plan.tree_grpo` with the window there."""
        settings = self.rollout
        return plan.tree_grpo(
            settings.steps,
            branching=settings.branching,
            window_size=settings.window_size,
            window_start=window_start,
            trees=settings.trees,
        )

    def credit(self, scores: Scores, forest: Rollout) -> Credit:
        """Algorithm 1, lines 11-18."""
        from treegrpo.advantage import backup

        leaves, settings = self.leaf_advantages(scores), self.advantage
        edges = backup(
            leaves,
            forest.log_probs,
            forest.plan,
            mode=settings.backup,
            temperature=settings.backup_temperature,
        )
        return Credit.of(leaves, edges)


class TreeGRPO(TreeMethod, PolicyGradient):
    """The paper's: the tree, and the clipped objective."""

    paper = "[TreeGRPO](https://arxiv.org/abs/2512.08153)"


class BranchSettings(FinalStepSettings):
    """How BranchGRPO grows samples."""

    branching: AtLeastOne = 2
    """Children of a node at each branching step."""
    split_steps: Annotated[list[AtLeastZero[int]], Field(min_length=1)] | None = None
    """The branching steps; null: 0, 3, 6 and 9 of 20 steps, in proportion to `rollout.steps`."""

    @field_validator("split_steps")
    @classmethod
    def _splits_fit(cls, split_steps: list[int] | None, info: ValidationInfo) -> list[int] | None:
        steps, branching = info.data.get("steps"), info.data.get("branching")
        if split_steps is None or steps is None:
            return split_steps
        if max(split_steps) >= steps:
            allowed = f"must be steps from 0 to {steps - 1} (rollout.steps is {steps})"
            raise problem(split_steps, allowed)
        if sorted(set(split_steps)) != split_steps:
            raise problem(split_steps, "must be in increasing order, each step once")
        if branching is not None:
            formula = "branching^(number of split_steps)"
            _check_leaves(info.data.get("max_leaves"), 1, branching, len(split_steps), formula)
        return split_steps


class BranchAdvantageSettings(AdvantageSettings):
    """How BranchGRPO's rewards become advantages."""

    # Its depths are small: over two nodes, the unbiased deviation is 1.41 times the population's.
    ddof: Literal[0, 1] = 1
    """0: population standard deviation; 1: the unbiased one."""


class BranchGRPO(PolicyGradient):
    """Every step is stochastic and some branch; advantages are normalised within each depth."""

    rollout_settings = BranchSettings
    advantage_settings = BranchAdvantageSettings
    rollout: BranchSettings
    paper = "[BranchGRPO](https://arxiv.org/abs/2509.06040)"

    @classmethod
    def published(cls, *, flow: bool) -> Mapping[str, Any]:
        """DanceGRPO's step, on whose code it was built; its own tree, which a TreeGRPO's is not."""
        settings = {
            "rollout.branching": 2,
            "advantage.ddof": 1,
            "advantage.eps": 1e-8,
            "objective.clip_low": 1e-3,
            "objective.clip_high": 1e-3,
        }
        if not flow:
            return settings
        return {"rollout.transition": "dance_sde", "rollout.noise_level": 0.3, **settings}

    def plan(self, iteration: int) -> RolloutPlan:
        """`plan.branch_grpo`, the same in every iteration."""
        settings = self.rollout
        return plan.branch_grpo(
            settings.steps,
            branching=settings.branching,
            split_steps=settings.split_steps or plan.branch_grpo_splits(settings.steps),
            deterministic_final_step=settings.deterministic_final_step,
        )

    def credit(self, scores: Scores, forest: Rollout) -> Credit:
        """Means over each node's leaves, normalised within the node's depth."""
        from treegrpo.advantage import depth_normalized

        leaves, settings = self.leaf_advantages(scores), self.advantage
        edges = depth_normalized(leaves, forest.plan, ddof=settings.ddof, eps=settings.eps)
        return Credit.of(leaves, edges)


def _check_leaves(
    most: int | None, trees: int, branching: int, exponent: int, formula: str
) -> None:
    if most is None:
        return  # it was refused, and has been reported
    # Far above any bound, the exact number is not worth the time that its digits take.
    leaves = trees * branching ** min(exponent, 64)
    if leaves > most:
        product = (
            f"{trees} * {branching}^{exponent}" if "trees" in formula else f"{branching}^{exponent}"
        )
        total = f" = {leaves}" if exponent <= 64 else ""
        allowed = f"a prompt would have {product}{total} samples ({formula}); use fewer, or raise "
        raise problem(most, allowed + "max_leaves", beside="max_leaves")
