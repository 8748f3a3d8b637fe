"""Memory of an iteration, phase by phase and part by part, and what a run takes of the disk.

Sizes that follow from the rollout plan are exact: weights, gradients, optimizer, states, images.

Left out: activations, which `skeleton.py` counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from treegrpo.config import Config, method_of
from treegrpo.memory.batches import Batches
from treegrpo.memory.skeleton import (
    FLOAT32,
    Decoding,
    Measurements,
    Skeleton,
    planned_device,
    total_bytes,
)
from treegrpo.methods import Method
from treegrpo.models.folder import check_full_training
from treegrpo.plan import RolloutPlan


@dataclass(frozen=True)
class StateCounts:
    """States (latents) of one prompt's forest.

    Attributes:
        kept: after the rollout, for the update: nodes, children and leaves, shared where one is the
            other.
        copied: the same after forests of several batches were joined, which shares nothing.
        by_step: alive while each step is computed.
        nodes: with stochastic children; each has a mean of the reference, where there is one.
    """

    kept: int
    copied: int
    by_step: tuple[int, ...]
    nodes: int


def count_states(plan: RolloutPlan, *, keep_means: bool = False) -> StateCounts:
    """How many states `rollout` holds of a prompt."""
    widths, by_step = plan.widths, []
    kept = 0
    shared = False  # whether the frontier is kept by the level before
    for step, stochastic in enumerate(plan.stochastic):
        frontier = 0 if shared or step == 0 else widths[step]
        following = widths[step + 1]
        by_step.append(plan.roots + kept + frontier + following * (2 if stochastic else 1))
        if stochastic:
            kept += following + frontier + (widths[step] if keep_means else 0)
        shared = stochastic
    if not shared:
        kept += widths[-1]
    if plan.stochastic[0]:
        kept += plan.roots  # the noise, which stays
    nodes = plan.update_forwards
    copied = (2 if keep_means else 1) * nodes + plan.edges + plan.leaves
    return StateCounts(kept, copied, tuple(by_step), nodes)


def most_prompts(config: Config) -> int:
    """Prompts whose embeddings a run keeps, where none comes twice; the negative one counted.

    Held-out ones are counted as far as `evaluation.max_prompts` says how many.
    """
    drawn = config.train.iterations * config.rollout.prompts_per_iteration
    return drawn + (config.evaluation.max_prompts or 0) + 1


# --- the estimate ---

Parts = Mapping[str, int]


@dataclass(frozen=True)
class Phase:
    """A phase of an iteration at its fullest.

    Attributes:
        device: part to bytes in the memory of the configured device.
        host: the same in the CPU's memory; empty where the device is the CPU.
    """

    name: str
    device: Parts
    host: Parts

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())


@dataclass(frozen=True)
class Estimate:
    """Memory of one process.

    Attributes:
        device: the configured one, such as "cuda".
        parameters: of the network.
        trained: those of them, or of its adapters, that are trained.
        decoder, encoders: parameters of the decoder and of the text encoders.
        guided: whether a forward takes two rows of the network.
        disk: bytes of the embeddings of all prompts, at most, of the states to resume from (one of
            which replaces the other) and of the exported model.
    """

    device: str
    parameters: int
    trained: int
    decoder: int
    encoders: int
    guided: bool
    phases: tuple[Phase, ...]
    disk: Parts

    @property
    def fullest(self) -> Phase:
        """That with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """Of the fullest phase, in bytes."""
        return self.fullest.peak

    def phase(self, name: str) -> Phase:
        """That of a name."""
        return next(phase for phase in self.phases if phase.name == name)


def estimate(
    config: Config,
    batches: Batches | None = None,
    *,
    processes: int = 1,
    measurements: Measurements | None = None,
) -> Estimate:
    """The memory that a run takes, by phase and part, once its optimizer has moments.

    Args:
        batches: what is auto in the configuration; None: the most that it can be.
        measurements: of an earlier estimate with as many steps, which spare measuring twice.

    Raises:
        ModelError: what `open_policy` refuses.
        PlanError: the window or the leaves do not fit, or a step has no density.
    """
    measured = measurements or Measurements(config.rollout.steps)
    skeleton = measured.skeleton(config.model)
    if not config.model.lora_rank:  # known only now, of a hub's checkpoint
        check_full_training(skeleton.policy.checkpoint.folder)
    method = method_of(config)
    plans = [share.plan for share in method.checked_plans(config.train.iterations)]
    levels = skeleton.policy.schedule(config.rollout.steps)
    for plan in plans:  # refuses a step without a density
        method.transitions(levels, plan)
    batches = Batches.of(config, batches)
    run = _Run(config, batches, method, measured, skeleton, plans, processes)
    policy, adapters = skeleton.policy, skeleton.adapters
    return Estimate(
        planned_device(config.model).type,
        sum(p.numel() for p in policy.network.parameters()) - sum(p.numel() for p in adapters),
        sum(p.numel() for p in skeleton.trained),
        sum(p.numel() for p in policy.vae.parameters()),
        sum(p.numel() for encoder in skeleton.encoders.values() for p in encoder.parameters()),
        policy.is_guided,
        run.phases(),
        run.disk(),
    )


@dataclass
class _Run:
    """One process of a run, for `estimate`: a method per phase."""

    config: Config
    batches: Batches
    method: Method
    measured: Measurements
    skeleton: Skeleton
    plans: Sequence[RolloutPlan]
    processes: int

    def __post_init__(self) -> None:
        config, method = self.config, self.method
        self.prompts = prompts = config.rollout.prompts_per_iteration // self.processes
        self.batch = min(config.rollout.prompts_per_batch or prompts, prompts)
        self.states = [count_states(plan, keep_means=method.keep_means) for plan in self.plans]
        self.on_cpu = planned_device(config.model).type == "cpu"
        self.trained = total_bytes(self.skeleton.trained)
        self.has_copy = method.needs_reference and not config.model.lora_rank

    def phases(self) -> tuple[Phase, ...]:
        """Of an iteration, in their order."""
        phases = [self._encode(), self._evaluation(), self._rollout(), self._decode()]
        if self.method.needs_reference:
            phases.append(self._reference())
        return (*phases, self._update(), self._optimizer())

    def disk(self) -> Parts:
        """By part."""
        config, prompts = self.config, most_prompts(self.config)
        copies = 3 + (config.train.ema_decay is not None)  # weights, two moments, average
        others = self._always["decoder"] + self._encoders
        return {
            "embeddings": 0 if config.model.embedding_cache is None else self._embeddings(prompts),
            "states": 2 * copies * self.trained,
            "model": self.trained + (0 if config.model.lora_rank else others),
        }

    def _phase(
        self, name: str, moments: Iterable[tuple[Parts, Parts]], *, always: bool = True
    ) -> Phase:
        """The fullest of moments, whose parts come to, or replace, those that are there always."""
        phases = []
        for device, host in moments:
            if always:
                device, host = {**self._always, **device}, {**self._always_on_host, **host}
            if self.on_cpu:
                both = {*device, *host}
                device, host = {p: device.get(p, 0) + host.get(p, 0) for p in both}, {}
            kept = [{p: parts[p] for p in PARTS if parts.get(p)} for parts in (device, host)]
            phases.append(Phase(name, *kept))
        return max(phases, key=lambda phase: phase.peak)

    # --- what is there all the time ---

    @cached_property
    def _always(self) -> dict[str, int]:
        config, skeleton = self.config, self.skeleton
        network = total_bytes(skeleton.policy.network.parameters())
        adapters = total_bytes(skeleton.adapters)
        parts = {
            "network": network - adapters,
            "adapters": adapters,
            "decoder": total_bytes(skeleton.policy.vae.parameters()),
            "optimizer": 2 * self.trained + FLOAT32 * len(skeleton.trained),  # and step counters
            "average": 0 if config.train.ema_decay is None else self.trained,
        }
        if config.model.embedding_cache is None:
            parts["text encoders"] = self._encoders
        if self.has_copy and not self.method.reference_on_cpu:
            parts["reference"] = network
        return parts

    @property
    def _always_on_host(self) -> dict[str, int]:
        waits = self.has_copy and self.method.reference_on_cpu
        return {"reference": self._always["network"]} if waits else {}

    @cached_property
    def _encoders(self) -> int:
        return sum(total_bytes(encoder.parameters()) for encoder in self.skeleton.encoders.values())

    def _embeddings(self, prompts: int) -> int:
        return prompts * self.skeleton.embedding_bytes

    def _kept(self, states: StateCounts) -> int:
        """Bytes of the forest that the update needs."""
        per_prompt = states.kept if self.batch == self.prompts else states.copied
        return per_prompt * self.prompts * self.skeleton.state_bytes

    def _stored(self, part: str, size: int) -> tuple[dict[str, int], dict[str, int]]:
        """On the device, or in the CPU's memory under offload."""
        return ({}, {part: size}) if self.config.rollout.offload else ({part: size}, {})

    # --- the phases ---

    def _encode(self) -> Phase:
        """Before the network is read, where prompts are not in the cache yet."""
        activations = self.measured.encode(self.config.model)
        parts = {"text encoders": self._encoders, "activations": activations}
        return self._phase("encode", [(parts, {})], always=False)

    def _evaluation(self) -> Phase:
        """As `evaluate`, which offloads nothing; the trained weights wait on the CPU."""
        images = self.config.evaluation.images_per_prompt
        prompts = max(1, self.batches.max_batch // images)
        if self.config.evaluation.max_prompts is not None:
            share = math.ceil(self.config.evaluation.max_prompts / self.processes)
            prompts = min(prompts, share)
        rows = prompts * images
        embeddings = {"embeddings": self._embeddings(prompts)}
        host = {} if self.config.train.ema_decay is None else {"average": self.trained}
        state, earlier = self.skeleton.state_bytes, rows * self._decoder(1).image
        # The images of the prompts before stay until the next ones come.
        moments = [
            {"activations": self._sampling(rows, 1), "states": 3 * rows * state, "images": earlier}
        ]
        for decoding in self._decoding(rows):
            images = decoding["images"] + earlier
            moments.append({**decoding, "images": images, "states": 2 * rows * state})
        return self._phase("evaluation", [({**embeddings, **moment}, host) for moment in moments])

    def _sampling(self, nodes: int, children: int) -> int:
        """Activations of a step on so many nodes."""
        rows = min(self.batches.max_batch, nodes)
        return self.measured.rollout(
            self.config.model, rows=rows, children=children, again=nodes > rows
        )

    def _rollout(self) -> Phase:
        settings, state = self.config.rollout, self.skeleton.state_bytes
        earlier = self.prompts - self.batch
        moments = []
        for plan, states in zip(self.plans, self.states, strict=True):
            images, images_on_host = self._images_before(plan)
            widest = self.batch * max(plan.widths[:-1])
            activations = self._sampling(widest, max(plan.branching))
            widest = min(widest, self.batches.max_batch)
            for step, alive in enumerate(states.by_step):
                rows = min(self.batches.max_batch, self.batch * plan.widths[step])
                size = (alive * self.batch + states.kept * earlier) * state
                device, host = self._stored("states", size)
                if settings.offload:
                    device["states"] = rows * (1 + plan.branching[step]) * state
                device["activations"] = activations * rows // widest
                device["embeddings"] = self._embeddings(self.batch)
                moments.append(({**device, **images}, {**host, **images_on_host}))
        return self._phase("rollout", moments)

    def _images_before(self, plan: RolloutPlan) -> tuple[dict[str, int], dict[str, int]]:
        """The last batch's, which stay until the next one's come."""
        if self.batch == self.prompts:
            return {}, {}
        return self._stored("images", self.batch * plan.leaves * self._decoder(1).image)

    def _decoder(self, rows: int, *, again: bool = False) -> Decoding:
        frames = max(reward.frames for reward in self.config.rewards)
        return self.measured.decode(self.config.model, rows=rows, frames=frames, again=again)

    def _decoding(self, leaves: int) -> list[dict[str, int]]:
        """Images and activations at the two fullest moments of `Policy.decode`."""
        rows = min(self.batches.decode_batch, leaves)
        decoder = self._decoder(rows, again=leaves > rows)
        before = max(leaves - 2 * rows, 0) * decoder.image
        return [
            {"images": before, "activations": decoder.peak},
            {"images": 2 * leaves * decoder.image},  # joined
        ]

    def _decode(self) -> Phase:
        """Of the last batch of prompts, and the joining of the batches after it."""
        moments = []
        for plan, states in zip(self.plans, self.states, strict=True):
            size = states.kept * self.prompts * self.skeleton.state_bytes
            device, host = self._stored("states", size)
            images, images_on_host = self._images_before(plan)
            for decoding in self._decoding(self.batch * plan.leaves):
                both = {**decoding, "images": decoding["images"] + images.get("images", 0)}
                moments.append(({**device, **both}, {**host, **images_on_host}))
            if self.batch < self.prompts:
                device, host = self._stored("states", size + self._kept(states))
                moments.append(({**device, **images}, {**host, **images_on_host}))
        return self._phase("decode", moments)

    def _for_update(self, states: StateCounts) -> tuple[dict[str, int], dict[str, int]]:
        size = self._kept(states)
        if self.method.needs_reference:
            size += states.nodes * self.prompts * self.skeleton.state_bytes
        device, host = self._stored("states", size)
        device["embeddings"] = self._embeddings(self.prompts)
        return device, host

    def _reference(self) -> Phase:
        """The reference's means; a copy that waits on the CPU comes to the device."""
        moments = []
        for plan, states in zip(self.plans, self.states, strict=True):
            device, host = self._for_update(states)
            widths = [plan.widths[step] for step in plan.stochastic_steps]
            widest = max(widths, default=plan.leaves) * self.prompts
            rows = min(self.batches.micro_batch, widest)
            device["activations"] = self.measured.rollout(
                self.config.model, rows=rows, children=1, again=widest > rows
            )
            if self.has_copy and not self.on_cpu:
                device["reference"], host["reference"] = self._always["network"], 0
            moments.append((device, host))
        return self._phase("reference", moments)

    def _update(self) -> Phase:
        micro_batch = self.batches.micro_batch
        share = self.prompts // self.config.train.updates_per_iteration
        moments = []
        for plan, states in zip(self.plans, self.states, strict=True):
            rows_by_step = [plan.widths[step] * share for step in plan.stochastic_steps]
            rows_by_step = rows_by_step or [self.method.update_forwards(plan) * share]
            rows = min(micro_batch, max(rows_by_step))
            batches = sum(math.ceil(rows / micro_batch) for rows in rows_by_step)
            siblings = max((plan.branching[step] for step in plan.stochastic_steps), default=0)
            batch = {"rows": rows, "siblings": siblings, "accumulate": batches > 1}
            peak = self.measured.update(self.config.model, self.method, **batch)
            device, host = self._for_update(states)
            gradients = min(self.trained, peak)
            device["activations"] = peak - gradients
            device["gradients"] = gradients
            if self.config.rollout.offload:
                device["states"] = rows * (1 + siblings) * self.skeleton.state_bytes
            moments.append((device, host))
        return self._phase("update", moments)

    def _optimizer(self) -> Phase:
        moments = []
        for states in self.states:
            device, host = self._for_update(states)
            device["gradients"] = self.trained
            if self.config.train.ema_decay is not None:
                # The average is moved one tensor at a time, by two temporary ones.
                device["activations"] = 2 * max(total_bytes([p]) for p in self.skeleton.trained)
            moments.append((device, host))
        return self._phase("optimizer", moments)


PARTS = (
    "network",
    "adapters",
    "reference",
    "decoder",
    "text encoders",
    "average",
    "optimizer",
    "gradients",
    "activations",
    "embeddings",
    "states",
    "images",
)
"""The parts of memory, in the order of tables."""
