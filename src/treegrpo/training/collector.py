"""From prompts to their forests and rewards: sample, decode, score.

In batches of prompts: while a server scores one batch's images, the next batch is sampled.

Left out: the rollout itself (`rollout.py`) and asking a reward (`rewards/scoring.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from treegrpo.batch_size import BatchSize
from treegrpo.config import Config
from treegrpo.finite import Watched, check_finite
from treegrpo.images import as_pictures
from treegrpo.methods import Method, Scores
from treegrpo.models.policy import Policy
from treegrpo.plan import RolloutPlan
from treegrpo.prompts import Prompt
from treegrpo.rewards import Reward, closing, score
from treegrpo.rollout import Rollout, join, rollout
from treegrpo.training.engine import Engine
from treegrpo.training.metrics import Stopwatch
from treegrpo.transition import transitions


@dataclass(frozen=True)
class Batch:
    """What an iteration learns from.

    Attributes:
        prompts: this process's.
        forest: their samples.
        rewards: name to float32 [prompts, leaves], of this process's prompts.
        everyones: name to float32 [all prompts, leaves], of all processes'.
    """

    prompts: tuple[Prompt, ...]
    forest: Rollout
    rewards: Mapping[str, Tensor]
    everyones: Mapping[str, Tensor]


class Collector:
    """Makes batches.

    Args:
        max_batch, decode_batch: rows of a rollout's forward, and decoded at once.
        failed_folder: where a failing reward leaves its images.

    Attributes:
        rewards: by name; all are asked, those with a weight above 0 are trained on.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        method: Method,
        rewards: Mapping[str, Reward],
        engine: Engine,
        max_batch: BatchSize,
        decode_batch: BatchSize,
        failed_folder: Path,
    ) -> None:
        self._max_batch, self._decode_batch = max_batch, decode_batch
        self._config, self._settings, self._seed = config, config.rollout, config.train.seed
        self._policy, self._method, self._engine = policy, method, engine
        self.rewards, self._failed_folder = rewards, failed_folder
        self._frames = {reward.key: reward.frames for reward in config.rewards}

    def collect(
        self, drawn: Sequence[Prompt], plan: RolloutPlan, iteration: int, watch: Stopwatch
    ) -> Batch:
        """Sample and score this process's share of an iteration's prompts.

        Args:
            drawn: the iteration's prompts, of all processes.
            iteration: decides the noises, with the seed.

        Raises:
            RewardError: a reward failed, here or on another process.
            NotFiniteError: the samples, the images or a reward's statistics are not finite.
        """
        with self._engine.failing_together():
            numbers = self._engine.share(range(len(drawn)))
            prompts = self._engine.share(drawn)
            forest, rewards = self._sample(prompts, numbers, plan, iteration, watch)
        everyones = {name: self._engine.gather(values) for name, values in rewards.items()}
        for name, values in everyones.items():
            least, most = values.min().item(), values.max().item()
            scores = f"the variance of the reward {name!r} (scores from {least:g} to {most:g}) is"
            check_finite(scores, values.var(correction=0))
        return Batch(tuple(prompts), forest, rewards, everyones)

    def scores(self, batch: Batch) -> Scores:
        """The rewards that are trained on, with their weights."""
        trained = self._config.trained_rewards
        return Scores(
            [batch.rewards[reward.key].to(self._policy.device) for reward in trained],
            [reward.weight for reward in trained],
            [batch.everyones[reward.key] for reward in trained],
        )

    def with_whole_tail(self, batch: Batch, number: int) -> Scores:
        """The trained rewards of one prompt's leaves, had their tails taken every step.

        Args:
            number: of the prompt in the batch.
        """
        level, schedule, policy = batch.forest.levels[-1], batch.forest.schedule, self._policy
        levels = tuple(range(level.step + 1, schedule.steps + 1))
        tail = (False,) * (len(levels) - 1)
        plan = RolloutPlan(level.children.shape[1], (1,) * len(tail), tail, levels)
        prompt = batch.prompts[number]
        predict = policy.predictor(policy.encode([prompt.text]), schedule.steps)
        steps = transitions(schedule, tail, levels=levels)
        states = level.children[number : number + 1]
        forest = self._max_batch.fit(
            lambda rows: rollout(
                predict, states, plan, schedule, steps, max_batch=rows, device=policy.device
            ),
            plan.leaves,
        )
        images = as_pictures(self._decode(forest.leaves.flatten(0, 1)))
        names = [reward.key for reward in self._config.trained_rewards]
        with ThreadPoolExecutor(max_workers=len(names)) as pool, closing(self.rewards):
            asked = self._score(images, [prompt], pool, names)
            values = [_result(asked[name]).to(policy.device) for name in names]
        return replace(self.scores(batch), values=values)

    def _sample(
        self,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        plan: RolloutPlan,
        iteration: int,
        watch: Stopwatch,
    ) -> tuple[Rollout, dict[str, Tensor]]:
        settings, size = self._settings, self._settings.prompts_per_batch or len(prompts)
        forests: list[Rollout] = []
        scores: list[dict[str, Tensor | Future[Tensor]]] = []
        workers = sum(getattr(reward, "concurrent", False) for reward in self.rewards.values())
        with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool, closing(self.rewards):
            for start in range(0, len(prompts), size):
                part = slice(start, start + size)
                with watch("rollout"):
                    forests.append(self._grow(prompts[part], numbers[part], plan, iteration))
                with watch("decode"):
                    images = self._decode(forests[-1].leaves.flatten(0, 1))
                    check_finite("the decoder's images are", images)
                    images = as_pictures(images.cpu() if settings.offload else images)
                with watch("reward"):
                    scores.append(self._score(images, prompts[part], pool, self.rewards))
            with watch("reward"):
                rewards = {
                    name: torch.cat([_result(part[name]) for part in scores])
                    for name in self.rewards
                }
        return join(forests), rewards

    def _grow(
        self,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        plan: RolloutPlan,
        iteration: int,
    ) -> Rollout:
        settings, policy = self._settings, self._policy
        # Each of the iteration's prompts has a generator of its own: what it draws depends neither
        # on the batches nor on the processes, and a resumed run draws what the unbroken one would.
        first = (self._seed * 1_000_003 + iteration) * 2**20
        schedule = policy.schedule(settings.steps)
        conditioning = policy.encode([prompt.text for prompt in prompts])
        check_finite("the prompts' embeddings are", *conditioning.values())

        def grow(rows: int) -> Rollout:
            generators = [
                torch.Generator(policy.device).manual_seed((first + number) % 2**63)
                for number in numbers
            ]
            noise = torch.stack([policy.noise(plan.roots, generator) for generator in generators])
            predict = Watched(policy.predictor(conditioning, settings.steps))
            forest = rollout(
                predict,
                noise.cpu() if settings.offload else noise,
                plan,
                schedule,
                self._method.transitions(schedule, plan),
                max_batch=rows,
                reduction=self._method.reduction,
                generator=generators,
                keep_means=self._method.keep_means,
                device=policy.device,
            )
            predict.check()
            return forest

        return self._max_batch.fit(grow, len(prompts) * max(plan.widths[:-1]))

    def _decode(self, leaves: Tensor) -> Tensor:
        frames = max(self._frames.values())
        return self._decode_batch.fit(
            lambda rows: self._policy.decode(leaves, rows, frames=frames), len(leaves)
        )

    def _score(
        self,
        images: Tensor,
        prompts: Sequence[Prompt],
        pool: ThreadPoolExecutor,
        names: Collection[str],
    ) -> dict[str, Tensor | Future[Tensor]]:
        """Reward name to float32 [prompts, leaves], or the promise of it."""
        leaves = len(images) // len(prompts)
        texts = [prompt.text for prompt in prompts for _ in range(leaves)]
        metadata = [dict(prompt.metadata) for prompt in prompts for _ in range(leaves)]
        concurrent = [name for name in names if getattr(self.rewards[name], "concurrent", False)]
        if concurrent:
            # A copy that a thread asked for would wait for the next rollout's work on the device.
            images = images.cpu()

        def ask(name: str) -> Tensor:
            frames, folder = self._frames[name], self._failed_folder
            values = score(name, self.rewards[name], images, texts, metadata, folder, frames)
            return values.view(len(prompts), leaves)

        asked: dict[str, Tensor | Future[Tensor]] = {
            name: pool.submit(ask, name) for name in concurrent
        }
        return asked | {name: ask(name) for name in names if name not in asked}


def _result(scores: Tensor | Future[Tensor]) -> Tensor:
    return scores.result() if isinstance(scores, Future) else scores
