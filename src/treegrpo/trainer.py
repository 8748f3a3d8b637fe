"""The training loop: rollout, decode, reward, advantage, update, log, save.

Read `train` first, then `Trainer.iterate`: together they are the algorithm. Engines (several
processes, mixed devices) come from Accelerate and the user's configuration of it; nothing here
knows about them beyond `prepare`, `backward`, `gather` and `clip_grad_norm_`.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor

from treegrpo import checkpoint, plan
from treegrpo.advantage import (
    EdgeAdvantages,
    backup,
    depth_normalized,
    leaf_advantages,
    without_signal,
)
from treegrpo.config import Config, RolloutConfig
from treegrpo.console import Display, stop_signal
from treegrpo.device import usable_device
from treegrpo.errors import UserError
from treegrpo.evaluate import Evaluation, check_prompts, evaluate
from treegrpo.images import as_pictures, evenly_spaced
from treegrpo.models.export import export, export_bytes
from treegrpo.models.folder import check_trainable
from treegrpo.models.opening import load_weights, open_policy
from treegrpo.models.policy import Policy
from treegrpo.objective import UpdateStatistics, losses, micro_batches, node_means
from treegrpo.plan import RolloutPlan, WindowSchedule
from treegrpo.prompts import Prompt, PromptSampler, load_train_and_held_out, overlap
from treegrpo.report.model_card import write_model_card
from treegrpo.report.run import RunLog, TrainingResult, describe, write_report, write_versions
from treegrpo.rewards import Reward, RewardError, closing, load_reward, score
from treegrpo.rollout import Predict, Rollout, join, rollout
from treegrpo.transition import transitions

# The first ratio is 1 by construction. What is allowed on top is the rounding of a model that
# computes in bfloat16 on batches of different shapes.
LARGEST_RATIO_ERROR = 1e-3
PICTURED_PROMPTS = 8
# How long processes wait for one that waits for a reward server, before they take it for dead.
PROCESS_PATIENCE = timedelta(hours=2)


def build_plan(rollout: RolloutConfig, window_start: int) -> RolloutPlan:
    """The plan that a configuration asks for, with the window where it stands now.

    Raises:
        PlanError: the window or the leaves do not fit.
    """
    steps, group_size = rollout.steps, rollout.group_size
    final = rollout.deterministic_final_step
    match rollout.method:
        case "tree_grpo":
            result = plan.tree_grpo(
                steps,
                branching=rollout.branching,
                window_size=rollout.window_size,
                window_start=window_start,
                trees=rollout.trees,
            )
        case "mix_grpo":
            result = plan.mix_grpo(
                steps,
                group_size=group_size,
                window_size=rollout.window_size,
                window_start=window_start,
            )
        case "dance_grpo":
            result = plan.dance_grpo(steps, group_size=group_size, deterministic_final_step=final)
        case "branch_grpo":
            splits = rollout.split_steps or [s for s in (0, 3, 6, 9) if s < steps]
            result = plan.branch_grpo(
                steps,
                branching=rollout.branching,
                split_steps=splits,
                deterministic_final_step=final,
            )
        case "flow_grpo" | "ddpo":
            result = plan.flow_grpo(steps, group_size=group_size, deterministic_final_step=final)
    result.check_leaves(rollout.max_leaves)
    return result


def window_schedule(config: Config) -> WindowSchedule:
    return WindowSchedule(
        config.rollout.window_schedule,
        config.rollout.steps,
        min(config.rollout.window_size, config.rollout.steps),
        config.rollout.window_start if config.rollout.window_schedule == "fixed" else 0,
        config.rollout.window_decay,
        config.rollout.shift_by,
        config.rollout.shift_every,
        config.train.seed,
    )


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> TrainingResult:
    """Train as configured; everything about the run is written to `config.output`.

    Raises:
        UserError: a setting, folder, model or prompt list that cannot be used; nothing was done.
        RewardError: a reward failed; the state before the failing iteration was saved.
    """
    trainer = Trainer(config, resume=resume)
    if trainer.is_main:
        checkpoint.check_space(config.output, trainer.state_bytes())
        checkpoint.prepare_folder(config, resume=resume, overwrite=overwrite)
        write_versions(config.output)
    trainer.accelerator.wait_for_everyone()
    log = RunLog(config.output, enabled=trainer.is_main)
    limit = (config.train.time_limit_minutes or math.inf) * 60
    with (
        Display(config.train.iterations, enabled=trainer.is_main) as display,
        stop_signal() as stop,
        closing(trainer.rewards),
    ):
        trainer.tell_warnings(display)
        before = last = trainer.evaluate()
        trainer.baseline = {
            name: (values.mean().item(), values.std(correction=0).item())
            for name, values in before.scores.items()
        }
        display.say(f"before: {describe(before)}")
        evaluated_at = 0
        if not resume:
            log.evaluation(0, before)
        else:
            trainer.load()
            missing = trainer.iteration > 0 and not log.has_evaluation(trainer.iteration)
            # The run may have ended before this was done; one process knows.
            if any(
                trainer.anywhere(missing and _is_due(config.evaluation.every, trainer.iteration))
            ):
                last, evaluated_at = trainer.evaluate(), trainer.iteration
                log.evaluation(evaluated_at, last)
        interrupted, late = trainer.anywhere(stop.requested, trainer.seconds >= limit)
        try:
            while trainer.iteration < config.train.iterations and not (interrupted or late):
                metrics = trainer.iterate()
                log.metrics(metrics)
                trainer.tell_warnings(display)
                display.show(metrics, trainer.seconds_left(limit))
                if _is_due(config.evaluation.every, trainer.iteration):
                    last, evaluated_at = trainer.evaluate(), trainer.iteration
                    log.evaluation(evaluated_at, last)
                if _is_due(config.train.save_every, trainer.iteration):
                    trainer.save()
                interrupted, late = trainer.anywhere(stop.requested, trainer.seconds >= limit)
        finally:
            trainer.save()
            if isinstance(sys.exception(), RewardError | UserError):
                # It is raised on all processes; a launcher ends them all when the first has ended.
                trainer.accelerator.wait_for_everyone()
        if evaluated_at != trainer.iteration:
            last = trainer.evaluate()
            log.evaluation(trainer.iteration, last)
    result = TrainingResult(
        config.output,
        {name: before.mean(name) for name in before.scores},
        {name: last.mean(name) for name in last.scores},
        trainer.iteration,
        trainer.seconds,
        trainer.rollout_forwards,
        trainer.update_forwards,
        interrupted,
    )
    if trainer.is_main:
        folder = config.output / checkpoint.MODEL_FOLDER
        trainer.export(folder)
        write_model_card(folder, config, trainer.policy, result)
        write_report(config, before, last, result, display)
    log.close()
    return result


def _is_due(every: int, iteration: int) -> bool:
    return every > 0 and iteration % every == 0


class Trainer:
    """The parts of a run and its state. `iterate` is one iteration; `train` drives it.

    Args:
        resume: continue the run in the output folder, once `load` has taken over what it trained.

    Raises:
        UserError: something cannot be used; the network's weights have not been read.
    """

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        self.config = config
        device = usable_device(config.model.device, "model.device")
        if device.index is not None and device.type != "cpu":
            if "LOCAL_RANK" in os.environ:
                raise UserError(
                    f"model.device: got {config.model.device!r}; must be 'auto' where several "
                    "processes share the devices, each of which has its own"
                )
            torch.accelerator.set_device_index(device.index)
        schedule = window_schedule(config)
        plans = [build_plan(config.rollout, start) for start in schedule.possible_starts]
        self.window = schedule
        self.rewards: dict[str, Reward] = {
            reward.key: load_reward(reward.name, reward.options) for reward in config.rewards
        }
        self.frames = {reward.key: reward.frames for reward in config.rewards}
        train_prompts, self.held_out = load_train_and_held_out(
            config.prompts.train,
            config.prompts.held_out,
            held_out_share=config.prompts.held_out_share,
            column=config.prompts.column,
            held_out_column=config.prompts.held_out_column,
        )
        self.warnings = _shared_prompts(train_prompts, self.held_out)
        self.held_out = self.held_out[: config.evaluation.max_prompts]
        check_prompts(self.rewards, [*train_prompts, *self.held_out])
        # Spread over the list, whose neighbors are often alike.
        self.pictured = evenly_spaced(len(self.held_out), PICTURED_PROMPTS)
        self.sampler = PromptSampler(train_prompts, config.train.seed)

        # Some networks have layers that get no gradient, such as the last block's text layers.
        distributed = DistributedDataParallelKwargs(
            find_unused_parameters=True, gradient_as_bucket_view=True
        )
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            kwargs_handlers=[distributed, InitProcessGroupKwargs(timeout=PROCESS_PATIENCE)],
        )
        self.is_main = self.accelerator.is_main_process
        ranks = self.accelerator.num_processes
        if config.rollout.prompts_per_iteration % (ranks * config.train.updates_per_iteration):
            raise UserError(
                f"rollout.prompts_per_iteration: got {config.rollout.prompts_per_iteration}; must "
                f"be a multiple of {ranks} processes x {config.train.updates_per_iteration} "
                "updates per iteration"
            )
        check_trainable(config.model.path)
        torch.manual_seed(config.train.seed)
        self.policy: Policy = open_policy(
            config.model, device=self.accelerator.device, steps=config.rollout.steps
        )
        # Building the transitions refuses a step without a density before any sampling.
        for shape in plans:
            self._transitions(shape)
        self.iteration = 0
        self.seconds = 0.0
        self.rollout_forwards = 0
        self.update_forwards = 0
        self._state = self._find_place() if resume else None
        # Before the network is read: the text encoders may be as large.
        self._prepare_prompts()
        load_weights(self.policy, config.model, train=True)
        self.parameters = [p for p in self.policy.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.train.learning_rate,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        # The policy keeps the bare network, which alone can be exported, and which samples without
        # waiting for other processes.
        self.network, self.optimizer = self.accelerator.prepare(self.policy.network, optimizer)
        decay = config.train.ema_decay
        self.average = None if decay is None else EMAModel(self.parameters, decay=decay)
        self.reference = self._build_reference()
        self.baseline: dict[str, tuple[float, float]] = {}  # of the untrained model's rewards

    def iterate(self) -> dict[str, float]:
        """One iteration; returns its metrics."""
        config, watch = self.config, _Stopwatch(self.policy.device)
        self._set_learning_rate()
        state = self.sampler.state_dict()
        try:
            window_start = self.window.at(self.iteration)
            shape = build_plan(config.rollout, window_start)
            numbers = self._own_share(range(config.rollout.prompts_per_iteration))
            drawn = self.sampler.next(config.rollout.prompts_per_iteration)
            prompts = [drawn[number] for number in numbers]
            with self._failing_together():
                forest, rewards = self._sample(prompts, numbers, shape, watch)
            advantages = self._advantages(rewards, forest)
            with watch("update"):
                predict = self._predictor(prompts, self.network)
                reference = self._reference_means(predict, forest, prompts)
                first, all_updates, gradient_norm = self._update(
                    predict, forest, advantages, reference
                )
        except BaseException:
            # The iteration did not happen: a resumed run draws these prompts again.
            self.sampler.load_state_dict(state)
            raise
        self.iteration += 1
        self.seconds += watch.total
        rollout_forwards = forest.forwards * self.accelerator.num_processes
        self.rollout_forwards += rollout_forwards
        self.update_forwards += all_updates.forwards
        return {
            "iteration": self.iteration - 1,
            **self._reward_metrics(rewards),
            "ratio_error": first.ratio_error,
            "ratio_mean": all_updates.ratio_mean,
            "ratio_min": all_updates.ratio_min,
            "ratio_max": all_updates.ratio_max,
            "clip_fraction": all_updates.clip_fraction,
            "kl": all_updates.kl,
            "loss": all_updates.loss,
            "gradient_norm": gradient_norm,
            "effective_sample_size": self._mean_over_processes(advantages.effective_sample_size),
            "window_start": window_start,
            "rollout_forwards": rollout_forwards,
            "update_forwards": all_updates.forwards,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": watch.total,
            **{f"seconds_{name}": seconds for name, seconds in watch.seconds.items()},
        }

    def tell_warnings(self, display: Display) -> None:
        """Those that have come up since the last time."""
        while self.warnings:
            display.say(f"warning: {self.warnings.pop(0)}")

    def seconds_left(self, limit: float) -> float:
        """Until the last iteration or the time limit, at the speed so far."""
        remaining = self.config.train.iterations - self.iteration
        return max(0.0, min(remaining * self.seconds / self.iteration, limit - self.seconds))

    # --- the stages of an iteration ---

    def _own_share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's prompts; a prompt's whole group lives on one process."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def _predictor(
        self, prompts: Sequence[Prompt], network: torch.nn.Module | None = None
    ) -> Predict:
        conditioning = self.policy.encode([prompt.text for prompt in prompts])
        return self.policy.predictor(conditioning, self.config.rollout.steps, network)

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """A reward that fails one process fails all, which would wait for that one in vain."""
        failure = None
        try:
            yield
        except RewardError as error:
            failure = error
        everyones = gather_object([None if failure is None else str(failure)])
        if failure is not None:
            raise failure
        for message in filter(None, everyones):
            raise RewardError(message)

    def anywhere(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on some process: all must leave a loop together."""
        return [any(each) for each in zip(*gather_object([flags]), strict=True)]

    def _mean_over_processes(self, value: float) -> float:
        values: list[float] = gather_object([value])
        return math.fsum(values) / len(values)

    def _over_processes(self, own: UpdateStatistics) -> UpdateStatistics:
        """Of all processes' edges; the loss is their mean, as the gradient is."""
        everyones = UpdateStatistics()
        for statistics in gather_object([own]):
            everyones.merge(statistics)
        everyones.loss /= self.accelerator.num_processes
        return everyones

    def _sample(
        self,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        shape: RolloutPlan,
        watch: _Stopwatch,
    ) -> tuple[Rollout, dict[str, Tensor]]:
        """The prompts' forests, and reward name to float32 [prompts, leaves].

        In batches: while a server scores one batch's images, the next batch is sampled.
        """
        settings = self.config.rollout
        size = settings.prompts_per_batch or len(prompts)
        forests: list[Rollout] = []
        scores: list[dict[str, Tensor | Future[Tensor]]] = []
        workers = sum(getattr(r, "concurrent", False) for r in self.rewards.values())
        with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool, closing(self.rewards):
            for start in range(0, len(prompts), size):
                part = prompts[start : start + size]
                with watch("rollout"):
                    forests.append(self._rollout(part, numbers[start : start + size], shape))
                with watch("decode"):
                    leaves = forests[-1].leaves.flatten(0, 1)
                    images = self.policy.decode(
                        leaves,
                        settings.decode_batch or settings.max_batch,
                        frames=max(self.frames.values()),
                    )
                    images = as_pictures(images.cpu() if settings.offload else images)
                with watch("reward"):
                    scores.append(self._score(images, part, pool))
            with watch("reward"):
                rewards = {
                    name: torch.cat([_result(part[name]) for part in scores])
                    for name in self.rewards
                }
        return join(forests), rewards

    def _transitions(self, shape: RolloutPlan) -> Any:
        config = self.config.rollout
        return transitions(
            self.policy.schedule(config.steps),
            shape.stochastic,
            config.transition,
            config.noise_level,
        )

    def _rollout(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], shape: RolloutPlan
    ) -> Rollout:
        config, policy = self.config, self.policy
        # Each of the iteration's prompts has a generator of its own: what it draws depends neither
        # on the batches nor on the processes, and a resumed run draws what the unbroken one would.
        first = (config.train.seed * 1_000_003 + self.iteration) * 2**20
        generators = [
            torch.Generator(policy.device).manual_seed((first + number) % 2**63)
            for number in numbers
        ]
        noise = torch.stack([policy.noise(shape.roots, generator) for generator in generators])
        return rollout(
            self._predictor(prompts),
            noise.cpu() if config.rollout.offload else noise,
            shape,
            policy.schedule(config.rollout.steps),
            self._transitions(shape),
            max_batch=config.rollout.max_batch,
            reduction=config.objective.log_prob_reduction,
            generator=generators,
            keep_means=config.objective.guard,
            device=policy.device,
        )

    def _score(
        self, images: Tensor, prompts: Sequence[Prompt], pool: ThreadPoolExecutor
    ) -> dict[str, Tensor | Future[Tensor]]:
        """Reward name to float32 [prompts, leaves], or the promise of it."""
        leaves = len(images) // len(prompts)
        texts = [prompt.text for prompt in prompts for _ in range(leaves)]
        metadata = [dict(prompt.metadata) for prompt in prompts for _ in range(leaves)]
        folder = self.config.output / checkpoint.FAILED_REWARD_FOLDER
        if any(getattr(reward, "concurrent", False) for reward in self.rewards.values()):
            # A copy that a thread asked for would wait for the next rollout's work on the device.
            images = images.cpu()

        def ask(name: str) -> Tensor:
            values = score(
                name, self.rewards[name], images, texts, metadata, folder, self.frames[name]
            )
            return values.view(len(prompts), leaves)

        asked: dict[str, Tensor | Future[Tensor]] = {
            name: pool.submit(ask, name)
            for name, reward in self.rewards.items()
            if getattr(reward, "concurrent", False)
        }
        return asked | {name: ask(name) for name in self.rewards if name not in asked}

    def _advantages(self, rewards: dict[str, Tensor], forest: Rollout) -> EdgeAdvantages:
        settings = self.config.advantage
        trained = [r for r in self.config.rewards if r.weight > 0]
        values = [rewards[r.key].to(self.policy.device) for r in trained]
        everyone = (
            [self.accelerator.gather(v) for v in values] if settings.std == "global" else None
        )
        leaves = leaf_advantages(
            values,
            [r.weight for r in trained],
            std=settings.std,
            ddof=settings.ddof,
            eps=settings.eps,
            advantage_clip=settings.advantage_clip,
            populations=everyone,
        )
        if self.config.rollout.method == "branch_grpo":
            return depth_normalized(leaves, forest.plan)
        return backup(
            leaves,
            forest.log_probs,
            forest.plan,
            mode=settings.backup,
            temperature=settings.backup_temperature,
        )

    def _update(
        self,
        predict: Predict,
        forest: Rollout,
        advantages: EdgeAdvantages,
        reference: Sequence[Tensor] | None,
    ) -> tuple[UpdateStatistics, UpdateStatistics, float]:
        """Optimizer steps; returns the first one's statistics, all of them, and the mean norm."""
        config = self.config
        prompts, parts = forest.leaves.shape[0], config.train.updates_per_iteration
        share = prompts // parts
        each: list[UpdateStatistics] = []
        norms: list[float] = []
        for _ in range(config.train.inner_epochs):
            for part in range(parts):
                statistics = UpdateStatistics()
                each_loss = losses(
                    predict,
                    forest,
                    advantages.levels,
                    clip_low=config.objective.clip_low,
                    clip_high=config.objective.clip_high,
                    micro_batch=config.train.micro_batch,
                    prompts=slice(part * share, (part + 1) * share),
                    kl_weight=config.objective.kl_weight,
                    reference=reference,
                    guard=config.objective.guard,
                    statistics=statistics,
                )
                for left in reversed(range(micro_batches(forest, share, config.train.micro_batch))):
                    # Processes exchange gradients once an update, with its last micro-batch.
                    alone = self.accelerator.no_sync(self.network)
                    with alone if left else nullcontext():
                        self.accelerator.backward(next(each_loss))
                if not each:
                    first = self._over_processes(statistics)
                    self._check_ratio(first)
                norm = self.accelerator.clip_grad_norm_(self.parameters, config.train.max_grad_norm)
                norms.append(float(norm))
                if not math.isfinite(norms[-1]):
                    # The weights are still those of before, and worth saving.
                    raise UserError(
                        f"the gradient of iteration {self.iteration} is not finite: training has "
                        "diverged; continue from an earlier state with a lower "
                        "train.learning_rate or train.max_grad_norm"
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.average is not None:
                    self.average.step(self.parameters)
                each.append(statistics)
        total = UpdateStatistics()
        for statistics in each:
            total.merge(statistics)
        return first, self._over_processes(total), sum(norms) / len(norms)

    # --- what surrounds them ---

    def _set_learning_rate(self) -> None:
        settings = self.config.train
        factor = min(1.0, (self.iteration + 1) / (settings.warmup_iterations + 1))
        if settings.learning_rate_schedule == "linear":
            factor = min(factor, 1 - self.iteration / settings.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.train.learning_rate * factor

    def _check_ratio(self, first: UpdateStatistics) -> None:
        if self.iteration == 0 and first.ratio_error > LARGEST_RATIO_ERROR:
            raise UserError(
                f"the first update's ratio is off 1 by {first.ratio_error:.2e} (allowed: "
                f"{LARGEST_RATIO_ERROR}): the model does not reproduce the log-probabilities that "
                "it sampled with; look for dropout, a changing batch dependence, or try "
                "model.dtype=float32"
            )
        if self.iteration == 0 and first.ratio_error > self.config.objective.clip_low:
            self.warnings.append(
                f"the first update's ratio is off 1 by {first.ratio_error:.1e}, more than "
                f"objective.clip_low ({self.config.objective.clip_low:g}): rounding alone clips; "
                "try model.dtype=float32"
            )

    def _reward_metrics(self, rewards: dict[str, Tensor]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        gathered = {
            name: self.accelerator.gather(values.to(self.policy.device)).cpu()
            for name, values in rewards.items()
        }
        main = next(r.key for r in self.config.rewards if r.weight > 0)
        for name, values in gathered.items():
            figures = {
                "reward": values.mean().item(),
                "reward_std": values.std(correction=0).item(),
                "reward_std_within_group": values.std(1, correction=0).mean().item(),
                "groups_without_signal": without_signal(values).sum().item(),
            }
            if name == main:
                metrics |= figures
            metrics |= {f"{key}/{name}": value for key, value in figures.items()}
            if name in self.baseline:
                mean, std = self.baseline[name]
                metrics[f"reward_normalized/{name}"] = (figures["reward"] - mean) / (std or 1.0)
        if self.config.accuracy is not None:
            metrics["accuracy"] = gathered[self.config.accuracy].mean().item()
        return metrics

    def _build_reference(self) -> torch.nn.Module | None:
        """A frozen copy of the initial model, where the KL term needs one (LoRA needs none)."""
        if self.config.objective.kl_weight == 0 or self.config.model.lora_rank:
            return None
        reference = copy.deepcopy(self.policy.network).requires_grad_(False)
        return reference.cpu() if self.config.objective.reference_on_cpu else reference

    def _reference_means(
        self, predict: Predict, forest: Rollout, prompts: Sequence[Prompt]
    ) -> tuple[Tensor, ...] | None:
        """The initial model's means at every node, where the KL term needs them."""
        if self.config.objective.kl_weight == 0:
            return None
        device, micro_batch = self.policy.device, self.config.train.micro_batch
        if self.reference is None:
            model: Any = self.policy.network
            model.disable_adapters()
            try:
                return node_means(predict, forest, device, micro_batch)
            finally:
                model.enable_adapters()
        conditioning = self.policy.encode([prompt.text for prompt in prompts])
        self.reference.to(device)
        initial = self.policy.predictor(conditioning, self.config.rollout.steps, self.reference)
        means = node_means(initial, forest, device, micro_batch)
        if self.config.objective.reference_on_cpu:
            self.reference.cpu()
        return means

    def _prepare_prompts(self) -> None:
        """Compute the embeddings of the run's prompts; the text encoders then leave memory."""
        left = self.config.train.iterations - self.iteration
        draws = left * self.config.rollout.prompts_per_iteration
        upcoming = [prompt.text for prompt in self.sampler.upcoming(draws)]
        texts = [prompt.text for prompt in self.held_out] + upcoming
        # The processes of a machine share its disk, and the work.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        own = texts[self.accelerator.local_process_index :: processes]
        self.policy.prepare(own, print if self.is_main else lambda text: None)
        self.accelerator.wait_for_everyone()

    def evaluate(self) -> Evaluation:
        """The current policy (its average, if one is kept) on the held-out prompts, of which each
        process takes a share."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        first, last = (number * len(self.held_out) // ranks for number in (rank, rank + 1))
        with self._averaged(), self._failing_together():
            own = evaluate(
                self.policy,
                self.held_out,
                self.rewards,
                images_per_prompt=self.config.evaluation.images_per_prompt,
                steps=self.config.rollout.steps,
                seed=self.config.evaluation.seed,
                max_batch=self.config.rollout.max_batch,
                decode_batch=self.config.rollout.decode_batch,
                keep=self.pictured,
                keep_folder=self.config.output / checkpoint.FAILED_REWARD_FOLDER,
                frames=self.frames,
                share=range(first, last),
            )
        return Evaluation.join(gather_object([own]))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, if an average is kept."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def state_bytes(self) -> int:
        """About what the checkpoint and the exported model take on disk."""
        trained = sum(p.numel() * p.element_size() for p in self.parameters)
        copies = 3 + (self.average is not None)  # weights, two moments, average
        return copies * trained + export_bytes(self.policy)

    def save(self) -> None:
        """Write the state from which `load` continues exactly."""
        if not self.is_main:
            return
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "rollout_forwards": self.rollout_forwards,
            "update_forwards": self.update_forwards,
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "sampler": self.sampler.state_dict(),
        }
        checkpoint.save_state(self.config.output, state)

    def _find_place(self) -> dict[str, Any]:
        """Where the saved run stands; returns its state, for `load`.

        Raises:
            RunError: the state is damaged.
            PromptError: it belongs to other prompts.
        """
        state = checkpoint.load_state(self.config.output)
        self.sampler.load_state_dict(state["sampler"])
        self.iteration = state["iteration"]
        self.seconds = state["seconds"]
        self.rollout_forwards = state["rollout_forwards"]
        self.update_forwards = state["update_forwards"]
        return state

    def load(self) -> None:
        """Take over what the run to resume has trained; until then the model is the initial one."""
        state, self._state = self._state, None
        assert state is not None
        with torch.no_grad():
            for parameter, stored in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(stored)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(self.policy.device)
        if self.is_main:
            # Metrics are an iteration's own; an evaluation comes after so many iterations.
            folder = self.config.output
            checkpoint.drop_lines_from(folder / checkpoint.METRICS_FILE, self.iteration)
            checkpoint.drop_lines_from(folder / checkpoint.EVALUATIONS_FILE, self.iteration + 1)

    def export(self, folder: Path) -> None:
        """Write the trained model for diffusers."""
        base = Path(self.config.model.path).expanduser()
        # LoRA weights name their base model, which must be found from any folder.
        base_model = str(base.resolve()) if base.is_dir() else self.config.model.path
        with self._averaged():
            export(self.policy, folder, base_model)


def _result(scores: Tensor | Future[Tensor]) -> Tensor:
    return scores.result() if isinstance(scores, Future) else scores


def _shared_prompts(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[str]:
    shared = overlap(train, held_out)
    if not shared:
        return []
    return [
        f"{len(shared)} of {len(held_out)} held-out prompts are trained on too, such as "
        f"{shared[0]!r}: figures on them say little about other prompts"
    ]


class _Stopwatch:
    """Seconds per named stage; waits for the device, so that a stage gets its own time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start
