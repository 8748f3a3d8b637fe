"""Rewards that any model can learn or fail, named in configurations as `toy_rewards:NAME`."""

import torch


def brightness(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
    return images.mean((1, 2, 3))
