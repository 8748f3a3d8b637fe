"""Sample and score: one loop for the held-out prompts of training and for `treegrpo evaluate`.

Left out: what the scores come to (`results.py`), and the pair of models that `treegrpo evaluate`
sets side by side (`pair.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from treegrpo.evaluation.results import Evaluation
from treegrpo.evaluation.sampling import sample_in_parts
from treegrpo.images import as_pictures, middle_frames
from treegrpo.models.policy import Policy
from treegrpo.prompts import Prompt
from treegrpo.rewards import Reward, RewardError, score

FRAMES = 4
"""Of a video, that a reward is asked about."""


@dataclass(frozen=True)
class Scored:
    """Some prompts' images and what the rewards say of them.

    Attributes:
        indices: of the prompts.
        images: as `sample` gives them.
        scores: reward name to float32 [prompts, images per prompt], on the CPU.
    """

    indices: range
    images: Tensor
    scores: dict[str, Tensor]


def sample_and_score(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    *,
    images_per_prompt: int,
    steps: int,
    seed: int,
    max_batch: int,
    decode_batch: int | None = None,
    keep_folder: Path | None = None,
    frames: Mapping[str, int] | None = None,
    share: range | None = None,
    failures: dict[str, str] | None = None,
) -> Iterator[Scored]:
    """Images of the prompts, batch by batch, each with its scores.

    Args:
        policy: with its weights.
        prompts: all of them.
        rewards: by name.
        images_per_prompt: as in `sample`.
        steps: as in `sample`.
        seed: of the noises; the same one gives every model the same noises.
        max_batch: as in `sample`.
        decode_batch: as in `sample`.
        keep_folder: where a failing reward leaves its images.
        frames: by reward, how many of a video's it is asked about; `FRAMES` if not given.
        share: only these consecutive prompts; None: all.
        failures: where a reward that fails is noted; it is not asked again. None: it is raised.

    Yields:
        What was sampled and scored, in the order of the prompts; without the rewards that failed.

    Raises:
        RewardError: a reward failed, and `failures` is None.
    """
    for indices, images in sample_in_parts(
        policy,
        [prompt.text for prompt in prompts],
        images_per_prompt=images_per_prompt,
        steps=steps,
        seed=seed,
        max_batch=max_batch,
        decode_batch=decode_batch,
        share=share,
    ):
        part = [prompts[index] for index in indices]
        yield Scored(
            indices, images, _scores(images, part, rewards, keep_folder, frames or {}, failures)
        )


def _scores(
    images: Tensor,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    keep_folder: Path | None,
    frames: Mapping[str, int],
    failures: dict[str, str] | None,
) -> dict[str, Tensor]:
    """What each reward says of a batch, as in `Scored`."""
    count = images.shape[1]
    repeated = [prompt for prompt in prompts for _ in range(count)]
    texts = [prompt.text for prompt in repeated]
    pictures, scores = as_pictures(images.flatten(0, 1)), {}
    for name, reward in rewards.items():
        if failures is not None and name in failures:
            continue
        metadata = [dict(prompt.metadata) for prompt in repeated]
        asked = frames.get(name, FRAMES)
        try:
            values = score(name, reward, pictures, texts, metadata, keep_folder, asked)
        except RewardError as error:
            if failures is None:
                raise
            failures[name] = str(error)
        else:
            scores[name] = values.view(len(prompts), count).cpu()
    return scores


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    *,
    images_per_prompt: int,
    steps: int,
    seed: int,
    max_batch: int,
    decode_batch: int | None = None,
    keep: Sequence[int] = (),
    keep_folder: Path | None = None,
    frames: Mapping[str, int] | None = None,
    share: range | None = None,
) -> Evaluation:
    """Score a model on prompts.

    Args:
        policy: with its weights.
        prompts: all of them.
        rewards: by name.
        images_per_prompt: as in `sample`.
        steps: as in `sample`.
        seed: of the noises; the same one gives every model the same noises.
        max_batch: as in `sample`.
        decode_batch: as in `sample`.
        keep: indices of prompts whose images are kept.
        keep_folder: where a failing reward leaves its images.
        frames: by reward, how many of a video's it is asked about; `FRAMES` if not given.
        share: evaluate only these consecutive prompts, as a part for `Evaluation.join`.

    Raises:
        RewardError: a reward failed.
    """
    start = time.perf_counter()
    share = range(len(prompts)) if share is None else share
    # Of no prompts at first: a process's share may be empty.
    scores = {name: [torch.empty(0, images_per_prompt)] for name in rewards}
    kept = [torch.empty(0, images_per_prompt, 3, *policy.sampling.size)]
    for part in sample_and_score(
        policy,
        prompts,
        rewards,
        images_per_prompt=images_per_prompt,
        steps=steps,
        seed=seed,
        max_batch=max_batch,
        decode_batch=decode_batch,
        keep_folder=keep_folder,
        frames=frames,
        share=share,
    ):
        for name, values in part.scores.items():
            scores[name].append(values)
        wanted = [index - part.indices.start for index in sorted(keep) if index in part.indices]
        kept.append(middle_frames(part.images[wanted]).cpu())
    return Evaluation(
        tuple(prompts[index].text for index in share),
        {name: torch.cat(parts) for name, parts in scores.items()},
        tuple(index for index in sorted(keep) if index in share),
        torch.cat(kept),
        time.perf_counter() - start,
    )
