"""Sample and score: one loop for the held-out prompts of training and for `treegrpo evaluate`.

Left out: what the scores come to (`results.py`), and the pair of models that `treegrpo evaluate`
sets side by side (`pair.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from treegrpo.evaluation.results import Evaluation
from treegrpo.evaluation.sampling import Draws, prompts_noises, sample
from treegrpo.images import as_pictures, middle_frames
from treegrpo.models.policy import Policy
from treegrpo.prompts import Prompt
from treegrpo.rewards import Reward, RewardError, score

FRAMES = 4
"""How many frames of a video a reward is asked about."""


def sample_and_score(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    draws: Draws,
    *,
    share: range | None = None,
    frames: Mapping[str, int] | None = None,
    keep_folder: Path | None = None,
    failures: dict[str, str] | None = None,
) -> Iterator[tuple[range, Tensor, dict[str, Tensor]]]:
    """Images and scores of the prompts in order, as many at a time as `draws.max_batch` allows.

    The noises depend on `draws` and on a prompt's place, not on the model or on `share`.

    Args:
        policy: with its weights.
        share: only these consecutive prompts; None: all.
        frames: by reward, how many of a video's it is asked about; `FRAMES` if not given.
        keep_folder: where a failing reward leaves its images.
        failures: where a reward that fails is noted; it is not asked again. None: it is raised.

    Yields:
        Indices of prompts, their images as `sample` gives them, and by reward their scores, float32
        [prompts, images per prompt] on the CPU.

    Raises:
        RewardError: a reward failed, and `failures` is None.
    """
    share = range(len(prompts)) if share is None else share
    count, noises = draws.images_per_prompt, prompts_noises(policy, draws)
    for _ in range(share.start):
        next(noises)  # the other prompts'
    start = share.start
    while start < share.stop:
        size = max(1, draws.max_batch.rows // count)
        indices = range(start, min(start + size, share.stop))
        start = indices.stop
        part = [prompts[index] for index in indices]
        images = sample(policy, [prompt.text for prompt in part], draws, noises)
        texts = [prompt.text for prompt in part for _ in range(count)]
        pictures, scores = as_pictures(images.flatten(0, 1)), {}
        for name, reward in rewards.items():
            if failures is not None and name in failures:
                continue
            metadata = [dict(prompt.metadata) for prompt in part for _ in range(count)]
            asked = (frames or {}).get(name, FRAMES)
            try:
                values = score(name, reward, pictures, texts, metadata, keep_folder, asked)
            except RewardError as error:
                if failures is None:
                    raise
                failures[name] = str(error)
            else:
                scores[name] = values.view(len(part), count).cpu()
        del pictures  # room for the next batch's
        yield indices, images, scores


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    draws: Draws,
    *,
    share: range | None = None,
    keep: Sequence[int] = (),
    frames: Mapping[str, int] | None = None,
    keep_folder: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Score a model on prompts by `sample_and_score`; of a share, a part for `Evaluation.join`.

    Args:
        keep: indices of prompts whose images are kept.
        progress: is told after each batch how many prompts of the share are done.

    Raises:
        RewardError: a reward failed.
    """
    start = time.perf_counter()
    share = range(len(prompts)) if share is None else share
    # Begun with none, because a process's share may be empty.
    scores = {name: [torch.empty(0, draws.images_per_prompt)] for name in rewards}
    kept = [torch.empty(0, draws.images_per_prompt, 3, *policy.sampling.size)]
    for indices, images, scored in sample_and_score(
        policy, prompts, rewards, draws, share=share, frames=frames, keep_folder=keep_folder
    ):
        for name, values in scored.items():
            scores[name].append(values)
        wanted = [index - indices.start for index in sorted(keep) if index in indices]
        kept.append(middle_frames(images[wanted]).cpu())
        progress(indices.stop - share.start)
    return Evaluation(
        tuple(prompts[index].text for index in share),
        {name: torch.cat(parts) for name, parts in scores.items()},
        tuple(index for index in sorted(keep) if index in share),
        torch.cat(kept),
        time.perf_counter() - start,
    )
