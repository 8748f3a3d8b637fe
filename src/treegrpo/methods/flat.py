"""Methods whose samples are trajectories of their own: Flow-GRPO, DDPO, DanceGRPO and MixGRPO.

As forests they never branch (DanceGRPO once, at its first step, to share the noise), and every edge
gets its trajectory's advantage.

Left out: what they have in common with trees (`policy_gradient.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    @classmethod
    def published(cls, *, flow: bool) -> Mapping[str, Any]:
        """The deviation of the whole batch."""
        return {"advantage.std": "global", "advantage.eps": 1e-4}

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

    @classmethod
    def published(cls, *, flow: bool) -> Mapping[str, Any]:
        """DDIM with eta 1, whose step to a level without noise has no density."""
        return {
            "rollout.transition": "ddim",
            "rollout.noise_level": 1.0,
            "rollout.deterministic_final_step": True,
        }


class DanceGRPO(FlowGRPO):
    """Flow-GRPO whose groups share their first noise."""

    paper = "[DanceGRPO](https://arxiv.org/abs/2505.07818)"
    trajectories = staticmethod(plan.dance_grpo)

    @classmethod
    def published(cls, *, flow: bool) -> Mapping[str, Any]:
        """Dance-SDE with eta 0.3; of diffusion models DDPO's step. The unbiased deviation."""
        advantage = {"advantage.ddof": 1, "advantage.eps": 1e-8}
        if not flow:
            return {**DDPO.published(flow=False), **advantage}
        return {"rollout.transition": "dance_sde", "rollout.noise_level": 0.3, **advantage}


class MixGRPO(WindowMethod, PolicyGradient):
    """Independent trajectories, stochastic and trained inside the window only."""

    rollout_settings = MixSettings
    rollout: MixSettings
    paper = "[MixGRPO](https://arxiv.org/abs/2507.21802)"

    @classmethod
    def published(cls, *, flow: bool) -> Mapping[str, Any]:
        """The unbiased deviation."""
        return {"advantage.ddof": 1, "advantage.eps": 1e-8}

    def plan_at(self, window_start: int) -> RolloutPlan:
        """`plan.mix_grpo` with the window there."""
        settings = self.rollout
        return plan.mix_grpo(
            settings.steps,
            group_size=settings.group_size,
            window_size=settings.window_size,
            window_start=window_start,
        )
