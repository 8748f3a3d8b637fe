"""Methods that learn from the forest's edges: what they have in common, whatever they maximize.

Left out: what that is (`policy_gradient.py`, `endpoint.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from treegrpo.errors import UserError
from treegrpo.methods.method import Method
from treegrpo.methods.settings import AdvantageSettings, EdgeSettings, RolloutSettings

# The first ratio is 1 by construction. What is allowed on top is the rounding of a model that
# computes in bfloat16 on batches of different shapes.
LARGEST_RATIO_ERROR = 1e-3


class EdgeMethod(Method):
    """Has edges with ratios, a divergence from the initial model and a trust region."""

    first_update_metrics = ("ratio_error",)
    objective_settings = EdgeSettings
    objective: EdgeSettings

    def __init__(
        self,
        rollout: RolloutSettings,
        advantage: AdvantageSettings,
        objective: EdgeSettings,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(rollout, advantage, objective, seed=seed)
        self.reduction = objective.log_prob_reduction
        self.keep_means = objective.max_divergence is not None
        self.needs_reference = objective.kl_weight > 0
        self.reference_on_cpu = objective.reference_on_cpu

    def check_first_update(self, record: Mapping[str, float]) -> list[str]:
        """The first ratio must be 1: the policy is still the one that sampled."""
        error = record["ratio_error"]
        if not error <= LARGEST_RATIO_ERROR:  # so that NaN is refused
            raise UserError(
                f"the first update's ratio is off 1 by {error:.2e} (allowed: "
                f"{LARGEST_RATIO_ERROR}): the model does not reproduce the log-probabilities that "
                "it sampled with; look for dropout, a changing batch dependence, or try "
                "model.dtype=float32"
            )
        return []
