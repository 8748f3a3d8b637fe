"""Methods whose losses are the clipped objective over the forest's edges, as published.

Left out: the objective itself (`objective.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from treegrpo.methods.edges import EdgeMethod
from treegrpo.methods.method import Update
from treegrpo.methods.settings import AdvantageSettings, ClippedSettings, RolloutSettings

if TYPE_CHECKING:
    from treegrpo.objective import Loss
    from treegrpo.rollout import Predict


class PolicyGradient(EdgeMethod):
    """Raises the probability of edges with a positive advantage, by clipped ratios."""

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
        self.keep_means = self.keep_means or objective.guard

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
            max_divergence=settings.max_divergence,
            reference=update.reference,
            prompts=update.prompts,
            micro_batch=update.micro_batch,
        )

    def check_first_update(self, record: Mapping[str, float]) -> list[str]:
        """Also warns where rounding alone would clip."""
        warnings = super().check_first_update(record)
        error, clip_low = record["ratio_error"], self.objective.clip_low
        if error > clip_low and self.objective.max_divergence is None:
            warnings.append(
                f"the first update's ratio is off 1 by {error:.1e}, more than objective.clip_low "
                f"({clip_low:g}): rounding alone clips; try model.dtype=float32"
            )
        return warnings
