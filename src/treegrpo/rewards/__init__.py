"""Rewards: what one is, how to name one, and how to ask it without trusting it.

Left out: the rewards themselves. Each is a file of this folder, imported once it is asked for, so
that this page imports neither torch nor a reward model.
"""

from treegrpo.rewards.registry import BUILT_IN, Reward, check_reward, load_reward
from treegrpo.rewards.scoring import RewardError, check_prompts, closing, score

__all__ = [
    "BUILT_IN",
    "Reward",
    "RewardError",
    "check_prompts",
    "check_reward",
    "closing",
    "load_reward",
    "score",
]
