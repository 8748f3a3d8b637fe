"""From a configuration to the parts of a run, each made from its own section.

What can be refused is refused first; the network's weights are read last.

Left out: what the parts do in an iteration (`loop.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from treegrpo import checkpoint
from treegrpo.config import Config, load_config, method_of
from treegrpo.console import Phase, silent
from treegrpo.errors import Problems
from treegrpo.evaluation.measure import evaluate
from treegrpo.evaluation.results import Evaluation
from treegrpo.evaluation.sampling import Draws
from treegrpo.finite import NotFiniteError
from treegrpo.images import evenly_spaced
from treegrpo.methods import Method, PlanShare
from treegrpo.models.export import export, export_bytes
from treegrpo.models.folder import check_trainable
from treegrpo.models.opening import load_weights, open_policy
from treegrpo.models.policy import Policy
from treegrpo.plan import PlanError
from treegrpo.prompts import Prompt, PromptSampler, load_train_and_held_out, overlap
from treegrpo.readable import counted
from treegrpo.rewards import Reward, check_prompts, kept_state, load_reward, take_state, try_reward
from treegrpo.run_folder import (
    CONFIG_FILE,
    EVALUATIONS_FILE,
    FAILED_REWARD_FOLDER,
    METRICS_FILE,
    STATE_FILE,
    RunError,
    check_dependencies,
    drop_lines_from,
    located,
)
from treegrpo.training.batches import BatchSizes, batch_sizes
from treegrpo.training.collector import Collector
from treegrpo.training.dependencies import dependencies
from treegrpo.training.engine import Engine
from treegrpo.training.learner import Learner, learning_rate
from treegrpo.training.metrics import RewardMetrics, SilentRewards
from treegrpo.training.tails import TailCheck

PICTURED_PROMPTS = 8


@dataclass
class Progress:
    """How far a run is: finished iterations, their seconds and their forwards (rows)."""

    iteration: int = 0
    seconds: float = 0.0
    rollout_forwards: int = 0
    update_forwards: int = 0


@dataclass
class Run:
    """The parts of a run.

    Attributes:
        held_out: the prompts that evaluations use.
        sampler: the training prompts, in the order in which they are drawn.
        warnings: to be told, once.
        dependencies: digests of the files that decide the numbers; on the main process.
        phase: is told what begins.
        reward_states: of the rewards that have one, after the last iteration; of every process.
    """

    config: Config
    engine: Engine
    method: Method
    policy: Policy
    rewards: dict[str, Reward]
    held_out: Sequence[Prompt]
    sampler: PromptSampler
    collector: Collector
    learner: Learner
    tail_check: TailCheck
    reward_metrics: RewardMetrics
    batches: BatchSizes
    silent_rewards: SilentRewards
    progress: Progress = field(default_factory=Progress)
    warnings: list[str] = field(default_factory=list)
    dependencies: dict[str, str] = field(default_factory=dict)
    phase: Phase = silent
    reward_states: list[dict[str, Any]] = field(default_factory=list)
    _saved: dict[str, Any] | None = None
    _saved_at: int | None = None
    _proven: bool = True

    def measure(self) -> Evaluation:
        """The current policy (its average, if one is kept) on the held-out prompts.

        Each process takes a share of them. Rewards forget what they have seen there.

        Raises:
            RewardError: a reward failed, here or on another process.
            NotFiniteError: the model's outputs or images are not finite.
        """
        config = self.config
        settings = config.evaluation
        share = self.engine.consecutive_share(len(self.held_out))

        def progress(done: int) -> None:
            self.phase("evaluation", f"{done}/{counted(len(share), 'prompt')}")

        self.phase("evaluation", f"of {counted(len(share), 'prompt')}")
        with (
            self.naming_stage(),
            self.learner.averaged(),
            self.rewards_unchanged(),
            self.engine.failing_together(),
        ):
            own = evaluate(
                self.policy,
                self.held_out,
                self.rewards,
                Draws(
                    settings.images_per_prompt,
                    config.evaluation_steps,
                    settings.seed,
                    self.batches.max_batch,
                    self.batches.decode_batch,
                ),
                share=share,
                keep=evenly_spaced(len(self.held_out), PICTURED_PROMPTS),
                frames={reward.key: reward.frames for reward in config.rewards},
                keep_folder=config.output / FAILED_REWARD_FOLDER,
                progress=progress,
            )
        return Evaluation.join(self.engine.everyones(own))

    def keep_reward_states(self) -> None:
        """Note what rewards remember: an iteration has been completed."""
        states = {name: kept_state(name, reward) for name, reward in self.rewards.items()}
        own = {name: state for name, state in states.items() if state is not None}
        self.reward_states = self.engine.everyones(own) if own else []

    def take_reward_states(self) -> None:
        """Let rewards go on from what was noted last."""
        if self.reward_states:
            for name, state in self.reward_states[self.engine.rank].items():
                take_state(name, self.rewards[name], state)

    @contextmanager
    def rewards_unchanged(self) -> Iterator[None]:
        """Whatever rewards are asked inside, what they remember is as it was noted last."""
        try:
            yield
        finally:
            self.take_reward_states()

    @contextmanager
    def naming_stage(self) -> Iterator[None]:
        """Say of what is not finite whether training can be the reason.

        Raises:
            NotFiniteError: what happens inside raised one.
        """
        try:
            yield
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}, {self._stage()}") from error

    def _stage(self) -> str:
        model = self.config.model
        if not self.learner.has_stepped:
            return (
                "before the first step of training: look at the weights of model.path "
                f"({model.path}) and at what they compute in (model.dtype, {model.dtype})"
            )
        return (
            f"after {self.progress.iteration} iterations: training has diverged; lower "
            "train.learning_rate or train.max_grad_norm"
        )

    def bytes_on_disk(self) -> int:
        """About what the checkpoint, while one replaces another, and the exported model take."""
        return 2 * self.learner.state_bytes() + export_bytes(self.policy)

    def save(self) -> None:
        """Write the state from which `restore` continues exactly, if that has not been done.

        What an interruption left is not the state after any iteration: the earlier one stays.
        """
        is_new = self._saved_at != self.progress.iteration
        if self.engine.is_main and is_new and self.learner.whole:
            self.phase("saving")
            state = {
                **vars(self.progress),
                **self.learner.state_dict(),
                "sampler": self.sampler.state_dict(),
                "rewards": self.reward_states,
            }
            checkpoint.save_state(self.config.output, state)
            self._saved_at, self._proven = self.progress.iteration, False

    def saved(self) -> str:
        """What a run that ends now can go on from, in words."""
        if self._saved_at is None:
            return "nothing was saved"
        return (
            f"the state after {counted(self._saved_at, 'iteration')} is saved: continue with the "
            "same command and --resume"
        )

    def prove(self) -> None:
        """What was saved last is sound: an iteration or an evaluation went well from it."""
        if self.engine.is_main:
            checkpoint.prove_state(self.config.output)
            self._proven = True

    def go_back(self) -> str:
        """Leave in the folder the last sound state, if there is one; returns what can be done."""
        if not self.engine.is_main or not self.learner.has_stepped:
            return ""
        folder = self.config.output
        if not checkpoint.take_back_state(folder) and not self._proven:
            (folder / STATE_FILE).unlink()
        if not (folder / STATE_FILE).exists():
            return "; no earlier state was saved: start again with --overwrite"
        iteration = checkpoint.load_state(folder)["iteration"]
        return (
            f"; --resume continues from the state after {iteration} iterations, and allows another "
            "train.learning_rate, train.max_grad_norm and clip range"
        )

    def restore(self) -> None:
        """Take over what the run to resume has trained; until then the model is the initial one."""
        assert self._saved is not None
        self.learner.load_state_dict(self._saved)
        self.reward_states = self._saved.get("rewards", [])
        self.take_reward_states()
        self._saved = None
        if self.engine.is_main:
            # Metrics are an iteration's own; an evaluation comes after so many iterations.
            folder, done = self.config.output, self.progress.iteration
            drop_lines_from(folder / METRICS_FILE, done)
            drop_lines_from(folder / EVALUATIONS_FILE, done + 1)

    def export(self, folder: Path) -> None:
        """Write the trained model for diffusers."""
        self.phase("saving")
        with self.learner.averaged():
            # LoRA weights name their base model, which must be found from any folder.
            export(self.policy, folder, located(self.config).model.path)

    def seconds_left(self, limit: float) -> float:
        """Until the last iteration or the time limit, at the speed so far."""
        done, seconds = self.progress.iteration, self.progress.seconds
        remaining = (self.config.train.iterations - done) * seconds / done
        return max(0.0, min(remaining, limit - seconds))


def build(config: Config, *, resume: bool = False, phase: Phase = silent) -> Run:
    """Make the parts of a run.

    Args:
        resume: continue the run in the output folder, once `Run.restore` takes over its weights.
        phase: is told what begins, here and in the run.

    Raises:
        UserError: something cannot be used; the network's weights have not been read.
    """
    engine, method = Engine(config.model), method_of(config)
    parts = _prepare(config, engine, method, phase)
    policy, rewards, held_out = parts.policy, parts.rewards, parts.held_out
    sampler = PromptSampler(parts.train_prompts, config.train.seed)
    progress = Progress()
    saved, told = None, []
    if resume:
        saved = _find_place(config, sampler, progress, engine.processes)
        told = _other_length(config, progress.iteration)
    phase("checking files")
    digests = dependencies(config, policy.checkpoint) if engine.is_main else {}
    if resume and engine.is_main:
        check_dependencies(config, digests)

    warnings = [*engine.warnings, *told, *_shared_prompts(parts.train_prompts, parts.all_held_out)]
    batches = batch_sizes(config, policy, engine, warnings, phase)
    # Before the network is read: the text encoders may be as large.
    left = config.train.iterations - progress.iteration
    upcoming = sampler.upcoming(left * config.rollout.prompts_per_iteration)
    texts = [prompt.text for prompt in [*held_out, *upcoming]]
    phase("encoding prompts")
    policy.prepare(engine.share_on_host(texts), phase, others=texts)
    engine.wait()

    phase("reading weights")
    torch.manual_seed(config.train.seed)  # of adapters
    load_weights(policy, config.model, train=True)
    failed, sampled = (
        config.output / FAILED_REWARD_FOLDER,
        (batches.max_batch, batches.decode_batch),
    )
    collector = Collector(config, policy, method, rewards, engine, *sampled, failed)
    run = Run(
        config,
        engine,
        method,
        policy,
        rewards,
        held_out,
        sampler,
        collector,
        Learner(policy, method, config.train, engine, batches.micro_batch, warnings),
        TailCheck(collector, method, engine, warnings),
        RewardMetrics(config),
        batches,
        SilentRewards([reward.key for reward in config.trained_rewards]),
        progress,
        warnings,
        digests,
        phase,
        _saved=saved,
        _saved_at=progress.iteration if resume else None,
    )
    run.keep_reward_states()
    return run


@dataclass(frozen=True)
class _Parts:
    """What a run is made of before weights are read, each part checked."""

    policy: Policy
    rewards: dict[str, Reward]
    train_prompts: Sequence[Prompt]
    all_held_out: Sequence[Prompt]
    held_out: Sequence[Prompt]


def _prepare(config: Config, engine: Engine, method: Method, phase: Phase) -> _Parts:
    """Make what reads no weights of the model; refuse all that is wrong with it together."""
    problems = Problems()
    rewards: dict[str, Reward] = {}
    prompts: tuple[list[Prompt], list[Prompt]] = [], []
    plans: Sequence[PlanShare] = ()
    policy = None
    with problems.collecting(PlanError):
        plans = method.checked_plans(config.train.iterations)
    phase("loading rewards")
    for reward in config.rewards:
        with problems.collecting():
            rewards[reward.key] = load_reward(reward.name, reward.options)
    with problems.collecting():
        prompts = load_train_and_held_out(config.prompts)
    train_prompts, all_held_out = prompts
    held_out = all_held_out[: config.evaluation.max_prompts]
    to_try: dict[str, Reward] = {}
    for name, made in rewards.items():
        with problems.collecting():
            check_prompts({name: made}, [*train_prompts, *held_out])
            to_try[name] = made
    with problems.collecting():
        config.check_shares(engine.processes)
    phase("opening the checkpoint")
    with problems.collecting(PlanError):
        check_trainable(config.model.path, in_full=not config.model.lora_rank)
        policy = open_policy(config.model, device=engine.device, steps=config.evaluation_steps)
        policy.schedule(config.evaluation_steps)
        schedule = policy.schedule(config.rollout.steps)
        for each in plans:  # refuses a step without a density before any sampling
            method.transitions(schedule, each.plan)
    size = policy.sampling.size if policy is not None else None
    device = "cpu" if config.rollout.offload else engine.device
    for name, made in to_try.items() if train_prompts else ():
        with problems.collecting():
            try_reward(name, made, train_prompts[0], size, device)
    problems.refuse()
    assert policy is not None
    return _Parts(policy, rewards, train_prompts, all_held_out, held_out)


def _find_place(
    config: Config, sampler: PromptSampler, progress: Progress, processes: int
) -> dict[str, Any]:
    """Where the saved run stands; returns its state.

    Raises:
        RunError: the state is damaged, or cannot go on as it is asked to.
        PromptError: it belongs to other prompts.
    """
    state = checkpoint.load_state(config.output)
    sampler.load_state_dict(state["sampler"])
    for name in vars(progress):
        setattr(progress, name, state[name])
    if config.train.iterations < progress.iteration:
        raise RunError(
            f"train.iterations: got {config.train.iterations}; must be at least "
            f"{progress.iteration}, which the run in {config.output} has done"
        )
    states = len(state.get("rewards", []))
    if states not in (0, processes):
        raise RunError(
            f"output: the run in {config.output} keeps what its rewards remember on {states} "
            f"processes; must be resumed with as many, not {processes}"
        )
    return state


def _other_length(config: Config, done: int) -> list[str]:
    """What another number of iterations than the run had does to its learning rate."""
    now, file = config.train, config.output / CONFIG_FILE
    before = load_config(file, []).train if file.is_file() else now
    if before.iterations == now.iterations:
        return []
    told = f"train.iterations was {before.iterations}, now {now.iterations}: the learning rate"
    if now.learning_rate_schedule == "linear":
        told += f" falls linearly to zero at iteration {now.iterations} from now on, and"
    if done < now.iterations:
        told += f" goes on at {learning_rate(now, done):.3g}"
    if done:
        told += f" (in the last iteration it was {learning_rate(before, done - 1):.3g})"
    return [told]


def _shared_prompts(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[str]:
    shared = overlap(train, held_out)
    if not shared:
        return []
    return [
        f"{len(shared)} of {len(held_out)} held-out prompts are trained on too, such as "
        f"{shared[0]!r}: figures on them say little about other prompts"
    ]
