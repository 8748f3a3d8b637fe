"""Methods whose losses are the clipped objective over the forest's edges: all built-in ones.

Left out: the objective itself (`objective.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from treegrpo.errors import UserError
from treegrpo.methods.method import Method, Update
from treegrpo.methods.settings import AdvantageSettings, ClippedSettings, RolloutSettings

if TYPE_CHECKING:
    from treegrpo.objective import Loss
    from treegrpo.rollout import Predict

# The first ratio is 1 by construction. What is allowed on top is the rounding of a model that
# computes in bfloat16 on batches of different shapes.
LARGEST_RATIO_ERROR = 1e-3


class PolicyGradient(Method):
    """Raises the probability of edges with a positive advantage, by clipped ratios."""

    first_update_metrics = ("ratio_error",)
    objective_settings = ClippedSettings
    objective: ClippedSettings

    def __init__(
        self,
        rollout: RolloutSettings,
        advantage: AdvantageSettings,
        objective: ClippedSettings,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(rollout, advantage, objective, seed=seed)
        self.reduction = objective.log_prob_reduction
        self.keep_means = objective.guard
        self.needs_reference = objective.kl_weight > 0
        self.reference_on_cpu = objective.reference_on_cpu

    def losses(self, predict: Predict, update: Update) -> Iterator[Loss]:
        """The clipped objective (`treegrpo.objective.losses`)."""
        from treegrpo.objective import losses

        settings = self.objective
        return losses(
            predict,
            update.forest,
            update.credit.edges,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            kl_weight=settings.kl_weight,
            guard=settings.guard,
            reference=update.reference,
            prompts=update.prompts,
            micro_batch=update.micro_batch,
        )

    def check_first_update(self, record: Mapping[str, float]) -> list[str]:
        """The first ratio must be 1: the policy is still the one that sampled."""
        error, clip_low = record["ratio_error"], self.objective.clip_low
        if not error <= LARGEST_RATIO_ERROR:  # so that NaN is refused
            raise UserError(
                f"the first update's ratio is off 1 by {error:.2e} (allowed: "
                f"{LARGEST_RATIO_ERROR}): the model does not reproduce the log-probabilities that "
                "it sampled with; look for dropout, a changing batch dependence, or try "
                "model.dtype=float32"
            )
        if error <= clip_low:
            return []
        return [
            f"the first update's ratio is off 1 by {error:.1e}, more than objective.clip_low "
            f"({clip_low:g}): rounding alone clips; try model.dtype=float32"
        ]
