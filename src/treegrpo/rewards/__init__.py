"""Rewards: what one is, how to name one, and how to ask it without trusting it.

Left out: the rewards themselves, each a file of this folder that is imported once it is asked for.
"""

from treegrpo.rewards.registry import BUILT_IN, Reward, check_reward, load_reward, reach_reward
from treegrpo.rewards.scoring import RewardError, check_prompts, closing, score, try_reward
from treegrpo.rewards.state import kept_state, take_state

__all__ = [
    "BUILT_IN",
    "Reward",
    "RewardError",
    "check_prompts",
    "check_reward",
    "closing",
    "kept_state",
    "load_reward",
    "reach_reward",
    "score",
    "take_state",
    "try_reward",
]
