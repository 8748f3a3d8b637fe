"""Methods whose samples are trajectories of their own: Flow-GRPO, DDPO, DanceGRPO and MixGRPO.

As forests they never branch (DanceGRPO once, at its first step, to share the noise), and every edge
gets its trajectory's advantage.

Left out: what they have in common with trees (`policy_gradient.py`).
"""

from __future__ import annotations

from treegrpo import plan
from treegrpo.methods.policy_gradient import PolicyGradient
from treegrpo.methods.settings import FinalStepSettings, GroupSettings
from treegrpo.methods.window import WindowMethod, WindowSettings
from treegrpo.plan import RolloutPlan


class FlatSettings(GroupSettings, FinalStepSettings):
    """How Flow-GRPO, DDPO and DanceGRPO grow samples."""


class MixSettings(GroupSettings, WindowSettings):
    """How MixGRPO grows samples."""


class FlowGRPO(PolicyGradient):
    """Independent trajectories; every step is stochastic and trained."""

    rollout_settings = FlatSettings
    rollout: FlatSettings
    paper = "[Flow-GRPO](https://arxiv.org/abs/2505.05470)"
    trajectories = staticmethod(plan.flow_grpo)

    def plan(self, iteration: int) -> RolloutPlan:
        """The same plan in every iteration."""
        settings = self.rollout
        return self.trajectories(
            settings.steps,
            group_size=settings.group_size,
            deterministic_final_step=settings.deterministic_final_step,
        )


class DDPO(FlowGRPO):
    """Flow-GRPO's plan for diffusion models, whose transition is ddim."""

    paper = "[DDPO](https://arxiv.org/abs/2305.13301)"


class DanceGRPO(FlowGRPO):
    """Flow-GRPO whose groups share their first noise."""

    paper = "[DanceGRPO](https://arxiv.org/abs/2505.07818)"
    trajectories = staticmethod(plan.dance_grpo)


class MixGRPO(WindowMethod, PolicyGradient):
    """Independent trajectories, stochastic and trained inside the window only."""

    rollout_settings = MixSettings
    rollout: MixSettings
    paper = "[MixGRPO](https://arxiv.org/abs/2507.21802)"

    def plan_at(self, window_start: int) -> RolloutPlan:
        """`plan.mix_grpo` with the window there."""
        settings = self.rollout
        return plan.mix_grpo(
            settings.steps,
            group_size=settings.group_size,
            window_size=settings.window_size,
            window_start=window_start,
        )
