"""Deterministic samples of a model: the same seed draws every model's images from the same noises.

Left out: the stochastic rollouts of training (`rollout.py`), and what is done with the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from treegrpo.models.policy import Policy
from treegrpo.plan import RolloutPlan
from treegrpo.rollout import rollout
from treegrpo.transition import transitions

# A decoder takes gigabytes per million pixels; more of them at once are hardly faster.
_DECODED_PIXELS = 2**21


def decode_batch_of(policy: Policy) -> int:
    """How many images or videos of the policy's size are decoded at once with little memory."""
    height, width = policy.sampling.size
    return max(1, _DECODED_PIXELS // (height * width * (policy.sampling.frames or 1)))


def sample(
    policy: Policy,
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    steps: int,
    generator: torch.Generator,
    max_batch: int,
    decode_batch: int | None = None,
    frames: int | None = None,
) -> Tensor:
    """Deterministic samples, each from a noise of its own.

    Args:
        policy: with its weights.
        prompts: P texts.
        images_per_prompt: N.
        steps: denoising steps.
        generator: of the noises, on the policy's device.
        max_batch: most images that go through the network at once.
        decode_batch: most that go through the decoder at once; None: as `max_batch`.
        frames: keep only so many of a video's, evenly spaced; None: all.

    Returns:
        float32 [P, N, 3, height, width] in [0, 1], or videos [P, N, frames, 3, height, width].
    """
    plan = RolloutPlan(images_per_prompt, (1,) * steps, (False,) * steps)
    schedule = policy.schedule(steps)
    noise = _draw_noise(policy, len(prompts), images_per_prompt, generator)
    forest = rollout(
        policy.predictor(policy.encode(prompts), steps),
        noise,
        plan,
        schedule,
        transitions(schedule, plan.stochastic),
        max_batch=max_batch,
    )
    leaves = forest.leaves.flatten(0, 1)
    images = policy.decode(leaves, decode_batch or max_batch, frames)
    return images.view(len(prompts), images_per_prompt, *images.shape[1:])


def sample_in_parts(
    policy: Policy,
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    steps: int,
    seed: int,
    max_batch: int,
    decode_batch: int | None = None,
    share: range | None = None,
) -> Iterator[tuple[range, Tensor]]:
    """`sample` as many prompts at a time as `max_batch` allows.

    The noises depend on the seed, the list of prompts and `images_per_prompt`, not on the model.

    Args:
        policy: with its weights.
        prompts: all of them.
        images_per_prompt: as in `sample`.
        steps: as in `sample`.
        seed: of the noises.
        max_batch: as in `sample`.
        decode_batch: as in `sample`.
        share: the consecutive prompts that are sampled; None: all.

    Yields:
        The indices of some prompts, and their images as `sample` gives them.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    share = range(len(prompts)) if share is None else share
    for _ in range(share.start):
        _draw_noise(policy, 1, images_per_prompt, generator)  # the other prompts'
    count = max(1, max_batch // images_per_prompt)
    for start in range(share.start, share.stop, count):
        indices = range(start, min(start + count, share.stop))
        images = sample(
            policy,
            prompts[indices.start : indices.stop],
            images_per_prompt=images_per_prompt,
            steps=steps,
            generator=generator,
            max_batch=max_batch,
            decode_batch=decode_batch,
        )
        yield indices, images


def _draw_noise(
    policy: Policy, prompts: int, images_per_prompt: int, generator: torch.Generator
) -> Tensor:
    """Noises [prompts, images_per_prompt, *latent_shape].

    They are drawn prompt by prompt, so that they do not depend on how prompts are batched.
    """
    return torch.stack([policy.noise(images_per_prompt, generator) for _ in range(prompts)])
