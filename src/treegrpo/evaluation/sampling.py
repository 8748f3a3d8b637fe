"""Deterministic samples of a model: the same seed draws every model's images from the same noises.

Left out: the stochastic rollouts of training (`rollout.py`), and what is done with the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from treegrpo.batch_size import BatchSize
from treegrpo.finite import Watched, check_finite
from treegrpo.models.policy import Policy
from treegrpo.plan import RolloutPlan
from treegrpo.rollout import Rollout, rollout
from treegrpo.transition import transitions

# A decoder takes gigabytes per million pixels; more of them at once are hardly faster.
_DECODED_PIXELS = 2**21


@dataclass(frozen=True)
class Draws:
    """What is drawn of every prompt.

    Attributes:
        steps: denoising steps.
        seed: of the noises; the same one gives every model the same noises.
        max_batch: most images that go through the network at once.
        decode_batch: most that go through the decoder at once.
    """

    images_per_prompt: int
    steps: int
    seed: int = 0
    max_batch: BatchSize = field(default_factory=lambda: BatchSize(16))
    decode_batch: BatchSize = field(default_factory=lambda: BatchSize(16))


def decode_batch_of(policy: Policy) -> BatchSize:
    """How many images or videos of the policy's size are decoded at once with little memory."""
    height, width = policy.sampling.size
    return BatchSize(max(1, _DECODED_PIXELS // (height * width * (policy.sampling.frames or 1))))


def prompts_noises(policy: Policy, draws: Draws) -> Iterator[Tensor]:
    """Noises [images per prompt, *latent_shape], for one prompt after the other without end."""
    # Drawn prompt by prompt, they do not depend on how prompts are batched.
    generator = torch.Generator(policy.device).manual_seed(draws.seed)
    while True:
        yield policy.noise(draws.images_per_prompt, generator)


def sample(
    policy: Policy,
    prompts: Sequence[str],
    draws: Draws,
    noises: Iterator[Tensor] | None = None,
) -> Tensor:
    """Deterministic samples, each from a noise of its own.

    Args:
        policy: with its weights.
        prompts: P texts.
        draws: of each, N images.
        noises: the next P are taken; None: the first of `prompts_noises`.

    Returns:
        float32 [P, N, 3, height, width] in [0, 1], or videos [P, N, frames, 3, height, width].

    Raises:
        NotFiniteError: something on the way to them is not finite.
    """
    steps = draws.steps
    plan = RolloutPlan(draws.images_per_prompt, (1,) * steps, (False,) * steps)
    schedule = policy.schedule(steps)
    noises = prompts_noises(policy, draws) if noises is None else noises
    conditioning = policy.encode(prompts)
    check_finite("the prompts' embeddings are", *conditioning.values())
    noise = torch.stack(list(islice(noises, len(prompts))))
    count = len(prompts) * draws.images_per_prompt

    def grow(rows: int) -> Rollout:
        predict = Watched(policy.predictor(conditioning, steps))
        forest = rollout(
            predict,
            noise,
            plan,
            schedule,
            transitions(schedule, plan.stochastic),
            max_batch=rows,
        )
        predict.check()
        return forest

    forest = draws.max_batch.fit(grow, count)
    latents = forest.leaves.flatten(0, 1)
    images = draws.decode_batch.fit(lambda rows: policy.decode(latents, rows), count)
    check_finite("the decoder's images are", images)
    return images.view(*forest.leaves.shape[:2], *images.shape[1:])
