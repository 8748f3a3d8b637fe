"""Rewards that any model can learn or fail, named in configurations as `toy_rewards:NAME`."""

import torch


def brightness(images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
    return images.mean((1, 2, 3))


class Keeps:
    """Brightness, by a reward that has options."""

    def __init__(self, **options: object) -> None:
        self.options = options

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: object) -> torch.Tensor:
        return brightness(images, prompts, metadata)
