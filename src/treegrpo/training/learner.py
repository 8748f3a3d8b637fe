"""The model under training: optimizer, learning rate, average, reference, update.

Left out: what is maximized (the method's losses) and gradients over processes (`engine.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from treegrpo.batch_size import BatchSize
from treegrpo.config import TrainConfig
from treegrpo.finite import NotFiniteError, check_finite
from treegrpo.methods import Credit, Method, Update
from treegrpo.models.adapters import has_lora, starts_as_base
from treegrpo.models.policy import Conditioning, Policy
from treegrpo.rollout import Predict, Rollout
from treegrpo.training.collector import Batch
from treegrpo.training.engine import Engine
from treegrpo.training.metrics import UpdateMetrics


def learning_rate(settings: TrainConfig, iteration: int) -> float:
    """Of an iteration's optimizer steps."""
    factor = min(1.0, (iteration + 1) / (settings.warmup_iterations + 1))
    if settings.learning_rate_schedule == "linear":
        factor = min(factor, 1 - iteration / settings.iterations)
    return settings.learning_rate * factor


class Learner:
    """A policy that learns.

    Args:
        micro_batch: rows of an update's forward.
        warnings: takes what is to be told.

    Attributes:
        parameters: those that are trained.
        optimizer: AdamW over them.
        average: their moving average, if one is kept.
        reference: a frozen copy of the initial network, where the losses need one.
        whole: whether the parameters are those after a whole number of iterations. What interrupts
            an update or an evaluation may leave others, which are not worth saving.
    """

    def __init__(
        self,
        policy: Policy,
        method: Method,
        settings: TrainConfig,
        engine: Engine,
        micro_batch: BatchSize,
        warnings: list[str],
    ) -> None:
        self.policy, self._method, self._settings, self._engine = policy, method, settings, engine
        self._micro_batch = micro_batch
        self.parameters = [p for p in policy.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.optimizer = engine.prepare(self.parameters, optimizer)
        decay = settings.ema_decay
        self.average = None if decay is None else EMAModel(self.parameters, decay=decay)
        # With LoRA, the initial model is the network without its adapters, or with those that
        # training starts from.
        has_copy = method.needs_reference and not has_lora(policy)
        starts = method.needs_reference and has_lora(policy) and not starts_as_base(policy)
        self._start = [p.detach().clone() for p in self.parameters] if starts else None
        self.reference = copy.deepcopy(policy.network).requires_grad_(False) if has_copy else None
        if self.reference is not None and method.reference_on_cpu:
            self.reference.cpu()
        self._warnings, self.whole = warnings, True

    def update(self, batch: Batch, credit: Credit, iteration: int) -> dict[str, float]:
        """An iteration's optimizer steps; returns their figures, over all processes.

        Raises:
            UserError: the model does not reproduce what it sampled with.
            NotFiniteError: the advantages or the gradient are not finite: the step was not taken.
        """
        with self._engine.failing_together():
            check_finite("the samples' advantages are", credit.leaves, *credit.edges)
        rate = self._set_learning_rate(iteration)
        conditioning = self.policy.encode([prompt.text for prompt in batch.prompts])
        predict = self.policy.predictor(conditioning, batch.forest.schedule.steps)
        with self._engine.failing_together():
            reference = self._at_reference(batch, conditioning)
        first, total, norm = self._optimize(predict, batch.forest, credit, reference, iteration)
        self.whole = True
        return {
            **total.record(),
            **{name: first[name] for name in self._method.first_update_metrics},
            "gradient_norm": norm,
            "update_forwards": total.forwards,
            "learning_rate": rate,
        }

    def _optimize(
        self,
        predict: Predict,
        forest: Rollout,
        credit: Credit,
        reference: tuple[Tensor, ...] | None,
        iteration: int,
    ) -> tuple[dict[str, float], UpdateMetrics, float]:
        """Returns the first step's figures, all steps', and the mean norm of their gradients."""
        settings, prompts = self._settings, forest.leaves.shape[0]
        share = prompts // settings.updates_per_iteration
        first: dict[str, float] = {}
        total, norms = UpdateMetrics(), []
        for start in [*range(0, prompts, share)] * settings.inner_epochs:
            part = slice(start, start + share)

            def add_gradient(rows: int, part: slice = part) -> UpdateMetrics:
                self.optimizer.zero_grad()  # of an attempt that ran out of memory halfway
                metrics = UpdateMetrics()
                for loss in self._method.losses(
                    predict, Update(forest, credit, reference, part, rows)
                ):
                    self._engine.backward(loss.value)
                    metrics.add(loss)
                return metrics

            with self._engine.failing_together():
                metrics = self._micro_batch.fit(add_gradient, share * forest.plan.leaves)
            self._engine.average_gradient(self.parameters)
            if not first:
                first = self._over_processes(metrics).record()
                if iteration == 0:
                    self._warnings += self._method.check_first_update(first)
            norms.append(self._step(iteration))
            total.merge(metrics)
        return first, self._over_processes(total), sum(norms) / len(norms)

    def _step(self, iteration: int) -> float:
        """Take the optimizer's step; returns the gradient's norm."""
        norm = self._engine.clip_gradient(self.parameters, self._settings.max_grad_norm)
        if not math.isfinite(norm):
            raise NotFiniteError(f"the gradient of iteration {iteration} is not finite")
        self.whole = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step(self.parameters)
        return norm

    def _set_learning_rate(self, iteration: int) -> float:
        rate = learning_rate(self._settings, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _over_processes(self, own: UpdateMetrics) -> UpdateMetrics:
        """What all processes' losses add up to; the loss is their mean, as the gradient is."""
        everyones = UpdateMetrics()
        for metrics in self._engine.everyones(own):
            everyones.merge(metrics)
        everyones.loss /= self._engine.processes
        return everyones

    def _at_reference(self, batch: Batch, conditioning: Conditioning) -> tuple[Tensor, ...] | None:
        """What the losses need of the initial model."""
        if not self._method.needs_reference:
            return None
        with self._initial_network() as network:
            forest, device = batch.forest, self.policy.device
            predict = self.policy.predictor(conditioning, forest.schedule.steps, network)
            return self._micro_batch.fit(
                lambda rows: self._method.reference(predict, forest, device, rows),
                len(forest.leaves) * forest.plan.leaves,
            )

    @contextmanager
    def _initial_network(self) -> Iterator[nn.Module]:
        network: Any = self.reference
        if self._start is not None:
            with self._holding(self._start):
                yield self.policy.network
            return
        if network is None:
            network = self.policy.network
            network.disable_adapters()
            try:
                yield network
            finally:
                network.enable_adapters()
            return
        yield network.to(self.policy.device)
        if self._method.reference_on_cpu:
            network.cpu()

    @contextmanager
    def _holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """These in place of the trained parameters."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._set(values)
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, if an average is kept."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.whole = False
        try:
            self.average.copy_to(self.parameters)
            yield
        finally:
            self.average.restore(self.parameters)
            self.whole = True

    # --- state ---

    @property
    def has_stepped(self) -> bool:
        """Whether the parameters are no longer the initial model's."""
        return bool(self.optimizer.state)

    def state_bytes(self) -> int:
        """About what `state_dict` takes on disk."""
        trained = sum(p.numel() * p.element_size() for p in self.parameters)
        return (3 + (self.average is not None)) * trained  # weights, two moments, average

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly here."""
        return {
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._set(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(self.policy.device)
