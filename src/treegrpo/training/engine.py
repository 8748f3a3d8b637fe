"""Several processes and mixed devices, by Accelerate and the user's configuration of it.

Nothing else in the package knows about processes: what is shared, gathered and waited for goes
through `Engine`.

Left out: sharded weights; every process holds the whole model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object
from torch import Tensor, nn

from treegrpo.batch_size import OutOfMemoryError
from treegrpo.config import ModelConfig
from treegrpo.device import usable_device
from treegrpo.errors import UserError
from treegrpo.finite import NotFiniteError
from treegrpo.rewards import RewardError

# How long processes wait for one that waits for a reward server, before they take it for dead.
PROCESS_PATIENCE = timedelta(hours=2)

_Item = TypeVar("_Item")

# What Accelerate would take from its environment, where `accelerate launch` puts it, behind the
# configuration's back. These would change no result: the value that asks for nothing, and what to
# set instead.
_NOT_FOLLOWED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1",
        "train.micro_batch splits a step without changing its gradient",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "model.compile=true compiles the model"),
}
_NOT_SUPPORTED = [
    f"ACCELERATE_USE_{name}"
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
]
_OFF = ("", "false", "no", "off", "0", "f", "n")


class Engine:
    """The processes of a run, seen from one of them.

    Attributes:
        device: where this process computes.
        rank, processes: its number, and how many there are.
        is_main: whether it is the one that writes and speaks.
        warnings: to be told, once.

    Raises:
        UserError: `model.device` cannot be used, or the environment asks Accelerate for something
            that the configuration does not say.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.warnings = _check_environment(model.dtype)
        device = usable_device(model.device, "model.device")
        if device.index is not None and device.type != "cpu":
            if "LOCAL_RANK" in os.environ:
                raise UserError(
                    f"model.device: got {model.device!r}; must be 'auto' where several processes "
                    "share the devices, each of which has its own"
                )
            torch.accelerator.set_device_index(device.index)
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            # All given, because each would be taken from the environment.
            mixed_precision="no",
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_PATIENCE)],
        )
        self.device: torch.device = self._accelerator.device
        if model.device != "auto" and self.device.type != device.type:
            raise UserError(
                f"model.device: got {model.device!r}, but ACCELERATE_USE_CPU or "
                f"ACCELERATE_TORCH_DEVICE sets {str(self.device)!r}; must be 'auto' to take that"
            )
        self.rank: int = self._accelerator.process_index
        self.processes: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process

    # --- shares ---

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """This process's, of what all processes have in the same order."""
        return items[self.rank :: self.processes]

    def consecutive_share(self, count: int) -> range:
        """This process's, of so many things in a row."""
        first, last = (number * count // self.processes for number in (self.rank, self.rank + 1))
        return range(first, last)

    def share_on_host(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """This process's, where those of one machine share its disk, and the work."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return items[self._accelerator.local_process_index :: processes]

    # --- what all processes know ---

    def gather(self, values: Tensor) -> Tensor:
        """All processes' values, joined along the first dimension, on this process's device."""
        gathered: Tensor = self._accelerator.gather(values.to(self.device))
        return gathered

    def everyones(self, value: _Item) -> list[_Item]:
        """A value of every process, in their order."""
        values: list[_Item] = gather_object([value])
        return values

    def anywhere(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on some process: all must leave a loop together."""
        return [any(each) for each in zip(*self.everyones(flags), strict=True)]

    def mean(self, value: float) -> float:
        """Over the processes."""
        values = self.everyones(value)
        return math.fsum(values) / len(values)

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What fails one process fails all, which would wait for that one in vain.

        Raises:
            RewardError, NotFiniteError, OutOfMemoryError: on every process.
        """
        failure = None
        try:
            yield
        except (RewardError, NotFiniteError, OutOfMemoryError) as error:
            failure = error
        everyones = self.everyones(None if failure is None else (type(failure), str(failure)))
        if failure is not None:
            raise failure
        for kind, message in filter(None, everyones):
            raise kind(message)

    # --- optimizing ---

    def prepare(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> torch.optim.Optimizer:
        """The optimizer as all processes use it, of parameters that are the main process's."""
        if self.processes > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.detach(), src=0)
        prepared: torch.optim.Optimizer = self._accelerator.prepare(optimizer)
        return prepared

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to this process's."""
        self._accelerator.backward(loss)

    def average_gradient(self, parameters: Sequence[nn.Parameter]) -> None:
        """Exchange gradients, once all that belongs to a step is in them.

        The backward passes exchange nothing (no DistributedDataParallel), so that a process may
        take more of them, or one again, without the others.
        """
        if self.processes == 1:
            return
        # Some layers get no gradient, such as the last block's text layers.
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self.processes)
        sums = [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
        for each in sums:
            each.wait()

    def clip_gradient(self, parameters: Sequence[nn.Parameter], largest: float) -> float:
        """Scale the gradient down to a norm of at most `largest`; returns the norm before."""
        return float(self._accelerator.clip_grad_norm_(parameters, largest))


def _check_environment(dtype: str) -> list[str]:
    """Refuse what contradicts the configuration; returns warnings of what is not followed.

    Raises:
        UserError: names every variable.
    """
    given = {name: value.strip().lower() for name, value in os.environ.items()}
    precision = given.get("ACCELERATE_MIXED_PRECISION", "")
    problems = [
        f"environment variable {name}: got {given[name]!r}; must be 'false' or unset: every "
        "process holds the whole model"
        for name in _NOT_SUPPORTED
        if given.get(name, "") not in _OFF
    ]
    if precision not in ("", "no", *(["bf16"] if dtype == "bfloat16" else [])):
        problems.append(
            f"environment variable ACCELERATE_MIXED_PRECISION: got {precision!r}; must be 'no' or "
            f"unset: model.dtype, here {dtype}, says what is computed in (float32 or bfloat16)"
        )
    if problems:
        raise UserError("\n  ".join(problems))
    return [
        f"environment variable {name}={given[name]} is not followed: {instead}"
        for name, (nothing, instead) in _NOT_FOLLOWED.items()
        if given.get(name, "") not in ("", nothing)
    ]
