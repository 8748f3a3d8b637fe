"""What a method is: settings, the plan of an iteration, credit for its rewards, and losses.

The training loop asks these questions in this order and knows nothing else of a method. Subclass
`Method` for an objective of another kind, `PolicyGradient` for one with ratios, or a built-in
method to change a part of it; name it as `rollout.method=my_module:MyMethod`.

Left out: growing the forest (`rollout.py`, the same for all), optimizing (`training/learner.py`).
Torch is imported inside functions only: configurations are read and refused without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from treegrpo.methods.settings import AdvantageSettings, ObjectiveSettings, RolloutSettings
from treegrpo.plan import PlanError, RolloutPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from treegrpo.advantage import EdgeAdvantages
    from treegrpo.objective import Loss
    from treegrpo.rollout import Predict, Rollout
    from treegrpo.transition import Reduction, Schedule, Transition, TransitionKind


@dataclass(frozen=True)
class PlanShare:
    """A plan that some of a run's iterations follow.

    Attributes:
        plan: of each prompt.
        share: of the iterations, in 0..1.
        name: what tells it from the run's other plans, such as "window at 3".
    """

    plan: RolloutPlan
    share: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Scores:
    """The rewards of an iteration that are trained on.

    Attributes:
        values: one float32 [prompts, leaves] per reward, of this process's prompts.
        weights: one per reward, positive.
        populations: as `values`, of all processes' prompts.
    """

    values: Sequence[Tensor]
    weights: Sequence[float]
    populations: Sequence[Tensor]


@dataclass(frozen=True)
class Credit:
    """What the samples are worth.

    Attributes:
        leaves: float32 [prompts, leaves], the advantage of every sample.
        edges: per stochastic level of the forest, float32 [prompts, edges], aligned with
            `Level.children`.
        metrics: figures for the record; processes' are averaged.
    """

    leaves: Tensor
    edges: tuple[Tensor, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(leaves: Tensor, edges: EdgeAdvantages) -> Credit:
        """What an estimator gives, with the effective number of siblings where some branch."""
        size = edges.effective_sample_size
        return Credit(
            leaves, edges.levels, {} if math.isnan(size) else {"effective_sample_size": size}
        )


@dataclass(frozen=True)
class Update:
    """What one optimizer step learns from.

    Attributes:
        forest: the iteration's samples.
        reference: of `Method.reference`, where the method needs it.
        prompts: those of the forest that the step is on.
        micro_batch: most rows of one model call.
    """

    forest: Rollout
    credit: Credit
    reference: Sequence[Tensor] | None
    prompts: slice
    micro_batch: int


def transition_kind(settings: RolloutSettings, *, is_flow: bool) -> TransitionKind:
    """The stochastic step that is set, or else the model family's own.

    Raises:
        PlanError: it is another family's.
    """
    kind = settings.transition
    if not is_flow and kind in ("flow_sde", "dance_sde"):
        raise PlanError(
            f"rollout.transition: got {kind}, which is for flow models; must be null, ddim or cps "
            "for a diffusion model"
        )
    return kind or ("flow_sde" if is_flow else "ddim")


class Method(ABC):
    """A way of learning from groups of samples.

    Args:
        rollout, advantage, objective: the configuration's sections, of the method's own classes.
        seed: of what the method draws, such as the window's start.
    """

    rollout_settings: ClassVar[type[RolloutSettings]] = RolloutSettings
    advantage_settings: ClassVar[type[AdvantageSettings]] = AdvantageSettings
    objective_settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings

    paper: ClassVar[str] = ""
    """A Markdown link, for model cards."""
    needs_edges: ClassVar[bool] = True
    """Whether the losses are about stochastic steps, so that a plan without any teaches nothing."""
    first_update_metrics: ClassVar[tuple[str, ...]] = ()
    """Figures of the losses of which an iteration's record shows the first update's alone."""
    reduction: Reduction = "mean"
    """How a log-probability is reduced over a state's dimensions."""
    keep_means: bool = False
    """Whether the losses need the Gaussian means with which the forest was sampled."""
    needs_reference: bool = False
    """Whether the losses need the initial model (`reference`)."""
    tail_check_every: int = 0
    """Iterations between two checks of tails that skip steps (`training/tails.py`); 0: never."""
    reference_on_cpu: bool = False
    """Whether a copy of the initial model waits in the CPU's memory between its uses."""

    rollout: RolloutSettings
    advantage: AdvantageSettings
    objective: ObjectiveSettings

    def __init__(
        self,
        rollout: RolloutSettings,
        advantage: AdvantageSettings,
        objective: ObjectiveSettings,
        *,
        seed: int = 0,
    ) -> None:
        self.rollout, self.advantage, self.objective = rollout, advantage, objective
        self.seed = seed

    @classmethod
    def published(cls, *, flow: bool) -> Mapping[str, Any]:
        """The settings with which the method was published, by key, where the defaults differ.

        `treegrpo compare` takes them; sources are in docs/compare.md. They are about the method
        alone: the job's steps, windows, group size and optimizer are the same for all.

        Args:
            flow: of a rectified flow, else of a diffusion model.
        """
        return {}

    # --- the plan ---

    @abstractmethod
    def plan(self, iteration: int) -> RolloutPlan:
        """The plan of an iteration (counted from 0): the same on every process and when resumed.

        Raises:
            PlanError: the settings make none.
        """

    def plans(self, iterations: int) -> tuple[PlanShare, ...]:
        """All plans that a run of so many iterations may follow, with shares that sum to 1."""
        return (PlanShare(self.plan(0)),)

    def checked_plans(self, iterations: int) -> tuple[PlanShare, ...]:
        """`plans`, of which every one can be learned from.

        Raises:
            PlanError: one has too many leaves, or no stochastic step where the losses need some.
        """
        shares = self.plans(iterations)
        for each in shares:
            each.plan.check_leaves(self.rollout.max_leaves)
            if self.needs_edges and not each.plan.stochastic_steps:
                raise PlanError(
                    f"rollout.method: {self.rollout.method} learns from stochastic steps, of which "
                    f"its plan has none (rollout.steps is {each.plan.steps}); raise rollout.steps "
                    "or make the last step stochastic (deterministic_final_step=false)"
                )
        return shares

    def transitions(self, schedule: Schedule, plan: RolloutPlan) -> tuple[Transition, ...]:
        """Every step's transition.

        Raises:
            PlanError: one has no density, or needs another kind of schedule.
        """
        from treegrpo.transition import transitions

        settings = self.rollout
        kind = transition_kind(settings, is_flow=schedule.is_flow)
        return transitions(schedule, plan.stochastic, kind, settings.noise_level, plan.levels)

    def update_forwards(self, plan: RolloutPlan) -> int:
        """Forwards with gradient (rows) of one pass over one prompt's forest."""
        return plan.update_forwards

    # --- what is learned ---

    def credit(self, scores: Scores, forest: Rollout) -> Credit:
        """Leaf advantages backed up by the mean over children.

        In a plan of trajectories every edge thus gets its trajectory's: plain GRPO.
        """
        from treegrpo.advantage import backup

        leaves = self.leaf_advantages(scores)
        return Credit.of(leaves, backup(leaves, forest.log_probs, forest.plan, mode="uniform"))

    def leaf_advantages(self, scores: Scores) -> Tensor:
        """Each sample's advantage over its group: float32 [prompts, leaves]."""
        from treegrpo.advantage import leaf_advantages

        settings = self.advantage
        return leaf_advantages(
            scores.values,
            scores.weights,
            std=settings.std,
            ddof=settings.ddof,
            eps=settings.eps,
            advantage_clip=settings.advantage_clip,
            populations=scores.populations,
        )

    def reference(
        self, predict: Predict, forest: Rollout, device: torch.device, micro_batch: int
    ) -> tuple[Tensor, ...]:
        """What the losses need of the initial model, computed once an iteration without gradient.

        Here its means at every node, per stochastic level [prompts, n, ...].
        """
        from treegrpo.objective import node_means

        return node_means(predict, forest, device, micro_batch)

    @abstractmethod
    def losses(self, predict: Predict, update: Update) -> Iterator[Loss]:
        """The losses of one optimizer step, one per micro-batch, whose sum is the objective.

        `treegrpo plan` runs them on tensors without values, so what is computed must not depend on
        numbers that are read out of a tensor.

        Args:
            predict: the policy under training; call it with gradient.
        """

    def check_first_update(self, record: Mapping[str, float]) -> list[str]:
        """Look at the figures of a run's first update, before its step; returns warnings.

        Args:
            record: the losses' figures by name.

        Raises:
            UserError: they show that the model cannot be trained so.
        """
        return []
